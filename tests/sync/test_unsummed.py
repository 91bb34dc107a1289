"""Gradients that are summed where they are used: the steps are those of written sums."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpilm import flat, optim
from mpilm.comm.node import Node, SharedMemoryError
from mpilm.launch import session
from mpilm.model.gpt import GPT
from mpilm.sync import _squares, allreduce
from mpilm.sync._gradients import Whole
from mpilm.sync._unsummed import Unsummed
from tests.helpers import everywhere
from tests.training_cases import DIVISIBLE, alone, build, configuration, course, same

pytestmark = pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
BLOCKS, STEPS, LR = 6, 3, 1e-2


@pytest.fixture(autouse=True)
def only_updates_are_compiled(monkeypatch, comm):
    """Blocks take longer, and have tests of their own. More ranks than two run what would be compiled as it is: to load
    a compiler in each takes longer than all the rest, and two ranks of four slots compile sums of eight gradients."""
    monkeypatch.setattr(GPT, "compile_parts", lambda part: None)
    if comm.size > 2:
        for module in (optim, _squares):
            monkeypatch.setattr(module, "compile_code", lambda function, *kind: function)


def of_one_slot(comm, collective="shared", *, micro_batch_size=2, reproducible=False, clip=0.0, tied=True, **options):
    """A step of one slot for each rank: without clipping the norm has no share in it, and a tied head leaves no sparse
    gradient, which is rounded."""
    return configuration(collective, reproducible=reproducible, micro_batch_size=micro_batch_size, clip=clip, tied=tied,
                         sequences=2 * comm.size, steps=STEPS, **options)


def steps(config, precision="bf16", *, compiled=True):
    """(losses, norms, parameters) over all ranks, and the kinds of gradients that buckets have."""
    with session() as world:
        core = build(config, world, precision=precision, compiled=compiled)
        found = course(core, config, draw=lambda step: np.random.default_rng(step).integers(
            0, 101, (config.data.global_batch_size, config.data.sequence_length + 1)))
        world.comm.Barrier()
        return found, {type(bucket.gradients) for bucket in core.sync.buckets}


def summed(config, monkeypatch):
    """The same with written sums, by the same compiled update."""
    with monkeypatch.context() as patch:
        patch.setattr(Unsummed, "build", lambda *_, **__: None)
        found, kinds = steps(config)
    assert kinds == {Whole}
    return found


@pytest.mark.ranks(min=2)
def test_steps_have_the_bits_of_written_sums(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 sums of the same gradients in the same order, norms of them too."""
    found, kinds = steps(of_one_slot(comm))
    expected = summed(of_one_slot(comm), monkeypatch)
    everywhere(comm, kinds == {Unsummed}, f"{kinds}")
    everywhere(comm, same(found, expected), f"{found[:2]}, not {expected[:2]}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("axes", [{}, {"pp": 2}, {"pp": 2, "schedule": "zb"}, {"tp": 2}, {"cp": 2}, {"cp": 3}], ids=str)
@pytest.mark.parametrize("slots", [1, 2, 4])
def test_in_reproducible_mode_all_bits_are_those_of_one_rank(slots: int, axes: dict[str, Any], comm: MPI.Comm,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    """Clipped by norms, with the rows of a table, along the tree over all slots; and those of written sums. Three
    ranks' slots are summed, rank by rank, as on other nodes."""
    if axes and slots != 2:
        pytest.skip("as without axes")
    ranks = math.prod(size for size in axes.values() if isinstance(size, int))
    replicas = comm.size // ranks
    if comm.size % ranks or replicas & (replicas - 1) or slots * replicas > 8:
        pytest.skip("no such tree")
    if replicas == 1 and "cp" not in axes:
        pytest.skip("no ranks to sum over")
    config = configuration("shared", sequences=slots * replicas, steps=STEPS, model=DIVISIBLE, clip=0.5, **axes)
    with session() as world:
        core = build(config, world, precision="bf16", compiled=True)
        kinds = {type(bucket.gradients) for bucket in core.sync.buckets}
        found = course(core, config)
        world.comm.Barrier()
    everywhere(comm, kinds == {Whole if slots > 1 and axes.get("cp") == 3 else Unsummed}, f"{kinds}")
    with monkeypatch.context() as patch, session() as world:
        patch.setattr(Unsummed, "build", lambda *_, **__: None)
        written = course(build(config, world, precision="bf16", compiled=True), config)
        world.comm.Barrier()
    everywhere(comm, same(found, written), f"{found[:2]}, not {written[:2]}")
    if not axes:
        one = alone(config, precision="bf16", compiled=True)
        everywhere(comm, same(found, one), f"{found[:2]}, not {one[:2]}")


@pytest.mark.ranks(min=2)
def test_two_slots_are_kept_apart_in_fast_mode(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """They need no more memory than their sum."""
    config = of_one_slot(comm, micro_batch_size=1)
    found, kinds = steps(config)
    expected = summed(config, monkeypatch)
    everywhere(comm, kinds == {Whole if comm.size == 3 else Unsummed}, f"{kinds}")
    everywhere(comm, np.allclose(found[0] + found[1], expected[0] + expected[1], rtol=1e-3), f"{found}, {expected}")

@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("axes", [{}, {"pp": 2}, {"tp": 2}], ids=str)
def test_rows_of_a_table_are_rounded_once(axes: dict[str, int], comm: MPI.Comm,
                                          monkeypatch: pytest.MonkeyPatch) -> None:
    """Sparse gradients, and a clipped norm, of which stages and teams have parts."""
    if comm.size % math.prod(axes.values()) or comm.size == math.prod(axes.values()):
        pytest.skip("no ranks to sum over")
    config = of_one_slot(comm, micro_batch_size=2 * math.prod(axes.values()), clip=1.0, tied=False, model=DIVISIBLE,
                         **axes)
    found, kinds = steps(config)
    expected = summed(config, monkeypatch)
    near = np.allclose(found[0], expected[0], rtol=1e-3) and np.allclose(found[1], expected[1], rtol=1e-2)
    everywhere(comm, kinds == {Unsummed} and near, f"{kinds} {found[:2]}, not {expected[:2]}")
    far = {name: (value - expected[2][name]).abs().mean().item() for name, value in found[2].items()}
    everywhere(comm, max(far.values()) < LR / 20, f"{far}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("why", ["three slots", "eight slots of a tree", "somebody has two", "float32",
                                 "another collective", "not compiled", "too many", "a journal", "compress",
                                 "nodes of one", "nodes of two"])
def test_where_sums_are_needed_they_are_written(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    compiled = why != "not compiled"
    config = of_one_slot(comm, "ring" if why == "another collective" else "shared",
                         reproducible=why == "eight slots of a tree", micro_batch_size=1 if "slots" in why else 2)
    if "slots" in why:
        config.data.global_batch_size = comm.size * (3 if why == "three slots" else 8)
    if why == "somebody has two":
        config.data.global_batch_size += 2
    if why == "too many":
        config.data.global_batch_size *= 2
        config.data.micro_batch_size = 2
        monkeypatch.setattr(flat, "MOST_ADDENDS", comm.size)
    if why == "compress":
        config.sync.compress = "bf16"
    if why == "nodes of two" and comm.size < 3:
        pytest.skip("one node")
    if why.startswith("nodes of"):
        monkeypatch.setenv("MPILM_RANKS_PER_NODE", "1" if why.endswith("one") else "2")
    if why == "a journal":
        monkeypatch.setattr(allreduce.ulfm, "active", lambda: True)
    if why == "eight slots of a tree" and comm.size & (comm.size - 1):
        pytest.skip("no power of two of slots")
    with session() as world:
        core = build(config, world, precision="fp32" if why == "float32" else "bf16", compiled=compiled)
        kinds = {type(bucket.gradients) for bucket in core.sync.buckets}
    everywhere(comm, kinds == {Whole}, f"{kinds}")


@pytest.mark.ranks(min=2)
def test_over_nodes_steps_are_those_of_one(comm: MPI.Comm, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which see nothing of each other: nobody may be content with the gradients of its own node."""
    expected, _ = steps(of_one_slot(comm))
    monkeypatch.setenv("MPILM_RANKS_PER_NODE", "1")
    found, kinds = steps(of_one_slot(comm))
    everywhere(comm, kinds == {Whole} and np.allclose(found[0], expected[0], rtol=1e-3), f"{found[0]}, {expected[0]}")
    everywhere(comm, np.allclose(found[1], expected[1], rtol=1e-3), f"{found[1]}, not {expected[1]}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("fails", [range(99), range(1)], ids=["all", "the first"])
def test_gradients_that_cannot_be_shared_are_summed(fails: range, comm: MPI.Comm,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    """Any of the buckets."""
    calls, allocate = itertools.count(), Node.allocate

    def full(node, count, dtype):
        if dtype == np.uint16 and next(calls) in fails:
            raise SharedMemoryError("no space")
        return allocate(node, count, dtype)

    config = of_one_slot(comm, bucket_mib=0.1)
    expected = summed(config, monkeypatch)
    monkeypatch.setattr(Node, "allocate", full)
    found, kinds = steps(config)
    everywhere(comm, kinds == ({Whole} if len(fails) > 1 else {Whole, Unsummed}), f"{kinds}")
    everywhere(comm, same(found, expected), f"{found[:2]}, not {expected[:2]}")


@pytest.mark.ranks(min=2)
def test_what_cannot_be_compiled_fails_before_anything_is_changed(comm: MPI.Comm,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    """On the rank that has no room for it, say."""
    def fail(*_):
        raise RuntimeError("g++ was killed")

    committed = []
    with session() as world:
        core = build(of_one_slot(comm), world, precision="bf16", compiled=True)
        before = {name: p.detach().clone() for name, p in core.parameters().items()}
        for name in before:
            core.sync._take(name, torch.full_like(before[name], 1e-3))
        monkeypatch.setattr(core.update, "_apply_compiled", fail)
        core.update.begin(0)
        with pytest.raises(RuntimeError, match="g\\+\\+ was killed"):
            core.sync.step(core.update, lambda: committed.append(True))
        kept = all(torch.equal(before[name], p) for name, p in core.parameters().items())
        everywhere(comm, kept and not committed)


@pytest.mark.ranks(min=2)
def test_a_gradient_that_is_not_finite_skips_the_step_on_all_ranks(comm: MPI.Comm) -> None:
    """Whoever has it; and nothing is changed."""
    config = of_one_slot(comm)
    with session() as world:
        core = build(config, world, precision="bf16", compiled=True)
        before = {name: p.detach().clone() for name, p in core.parameters().items()}
        for name in before:
            core.sync._take(name, torch.full_like(before[name], 1e-3))
        if world.rank == world.size - 1:
            core.sync.buckets[-1].gradients.mine[0][5] = math.nan
        core.update.begin(0)
        core.sync.step(core.update)
        kept = all(torch.equal(before[name], p) for name, p in core.parameters().items())
        found = core.sync.grad_norm
        everywhere(comm, kept and core.update.skipped == 1 and math.isnan(found), f"{found}")
        for name in before:
            core.sync._take(name, torch.full_like(before[name], 1e-3))
        core.sync.step(core.update)
        elements = sum(p.numel() for p in core.parameters().values())
        norm = float(torch.tensor(1e-3).bfloat16()) * comm.size * math.sqrt(elements)
        everywhere(comm, core.update.applied == 1 and core.sync.grad_norm == pytest.approx(norm, rel=1e-5))
        world.comm.Barrier()


@pytest.mark.serial
def test_an_optimizer_that_adds_nothing_gets_sums() -> None:
    """Compiled or not."""
    assert optim.get("adamw")(configuration().optim, 10, compiled=True).adds
    assert not optim.get("sgd")(configuration().optim, 10, compiled=True).adds
