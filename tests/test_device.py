"""Training on a device that works late: the bits of a host. And which device a rank gets, as far as that shows here."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpilm import assemble, device, placement
from mpilm.comm import arrays, aware
from mpilm.comm.devices import HOST
from mpilm.comm.transport import Direct, Staged
from mpilm.config import Config, Parallel, Run
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.sync import compress
from tests import server_cases
from tests.comm.late import Late
from tests.device_cases import on
from tests.helpers import everywhere
from tests.training_cases import VOCAB, alone, arithmetic, configuration, course, parallel, same, sharded

serial = pytest.mark.serial
WAYS = {"allreduce": configuration, "level 1": lambda name: sharded(name, 1)}


@pytest.mark.parametrize("how", [Direct, pytest.param(Staged, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["shared", "tree"])
@pytest.mark.parametrize("way", WAYS)
def test_steps_have_the_bits_of_a_host(way: str, name: str, how: type, comm: MPI.Comm) -> None:
    if name == "tree" and comm.size & (comm.size - 1):
        pytest.skip("no power of two of ranks")
    config = WAYS[way](name)
    for precision in ("fp32", "bf16"):
        expected = alone(configuration(), precision=precision)
        found = on(how(Late(comm.rank, immediate=True)), config, precision)
        everywhere(comm, same(found, expected), f"{precision}: {found[:2]}, not {expected[:2]}")


@pytest.mark.parametrize("way", WAYS)
def test_a_step_that_does_not_follow_its_thread_shows(way: str, comm: MPI.Comm,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """Without events, buckets leave before they are full, or are used before they have arrived."""
    monkeypatch.setattr("tests.comm.late.SELDOM", 1)
    late = Late(comm.rank, immediate=True)
    late.follow = lambda event: None
    expected = alone(configuration())
    wrong = not same(on(Direct(late), WAYS[way]("shared")), expected)
    assert any(comm.allgather(wrong)), "the bits are right for all that"


@pytest.mark.turns(at=(1, 3))
@pytest.mark.ranks(max=3)      # as the next one: nothing is new with four, and it takes long
@pytest.mark.parametrize(("way", "code"), [*(("allreduce", name) for name in compress.names()), ("level 2", "none")])
@pytest.mark.parametrize("how", [Direct, Staged])
def test_arrays_need_not_be_numpys(way: str, code: str, how: type, comm: MPI.Comm) -> None:
    """What a late device cannot play, because torch works on its memory in the communication thread too."""
    config = sharded("ring", 2, reproducible=False) if way == "level 2" else configuration("ring", reproducible=False)
    config.sync.compress = code
    found = on(how(Late(prompt=True)), config)
    everywhere(comm, same(found, parallel(config)), f"{found[:2]}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_stages_send_through_the_host(schedule: str, comm: MPI.Comm) -> None:
    """In pieces of a few rows; torch works on a host's memory here, so it is a host's that is staged."""
    if comm.size % 2:
        pytest.skip("a rank is left over")
    staged = Staged(HOST, piece_bytes=1024)
    found = on(staged, configuration("shared", pp=2, schedule=schedule), "bf16")
    everywhere(comm, same(alone(configuration(), precision="bf16"), found), f"{found[:2]}")


@pytest.mark.turns(at=(1, 3))
@pytest.mark.ranks(max=3)
@pytest.mark.parametrize("how", [Direct, Staged])
@pytest.mark.parametrize("fragments", [0, 2])
def test_replicas_that_train_by_themselves(fragments: int, how: type, comm: MPI.Comm) -> None:
    """Averages, outer momentum, and what a checkpoint has of them."""
    config = configuration("ring", kind="local_sgd", reproducible=False, bucket_mib=0.05, steps=5)
    config.sync.every, config.sync.outer_momentum, config.sync.outer_lr = 2, 0.9, 0.7
    config.sync.fragments = fragments
    found = []
    for transport in (Direct(HOST), how(Late(comm.rank, immediate=True))):
        with session() as world:
            shape = assemble.shape_of(config, VOCAB)
            core = assemble.build(config, world, shape, arithmetic(config), transport=transport)
            assemble.restore(core, shape, config, None)
            trained = course(core, config)
            with core.sync.averaged():
                average = [p.detach().clone() for p in core.parameters().values()]
            runs = core.sync.runs(comm.rank, comm.size)
            found.append((trained, average, {run[:3]: arrays.fetch(run[3]).copy() for run in runs}))
            world.comm.Barrier()
    (one, one_average, one_runs), (other, average, runs) = found
    everywhere(comm, same(one, other) and all(map(torch.equal, one_average, average)), f"{one[:2]}, not {other[:2]}")
    everywhere(comm, all(np.array_equal(runs[key], values) for key, values in one_runs.items()) and len(runs) > 9)


@pytest.mark.turns(at=(3, 4))
@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("compress", ["none", "int8"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_workers_of_servers(precision: str, compress: str, comm: MPI.Comm) -> None:
    """Gradients go to the host and weights come from there."""
    config = server_cases.with_servers(1)
    config.sync.compress = compress
    late = Direct(Late(comm.rank, immediate=True))
    found = server_cases.train(config, precision=precision, transport=late)
    expected = server_cases.train(config, precision=precision)
    everywhere(comm, found is None or same(found, expected), f"{found and found[:2]}")


@pytest.mark.parametrize("ask", [True, False])
def test_what_mpi_takes_is_asked_and_tried(ask: bool, comm: MPI.Comm) -> None:
    """A host's memory stands for a GPU's here: whoever takes it takes any that is a host's."""
    answer = aware.answer(HOST, comm, ask=ask)
    assert answer.usable or ask
    assert "do" in answer.why or "arrive" in answer.why


def test_a_process_that_dies_of_it_is_a_no_on_all_ranks(comm: MPI.Comm) -> None:
    dies = [sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(signal.SIGSEGV)})"]
    usable, why = aware.answer(HOST, comm, ask=False, probe=dies)
    assert not usable
    assert f"ended with {-signal.SIGSEGV}" in why


@pytest.mark.ranks(min=2)
def test_messages_that_arrive_as_something_else_are_a_no(comm: MPI.Comm) -> None:
    late = Late(comm.rank)
    late.settle = lambda: None
    assert not all(aware.answer(late, comm, ask=False, probe=[sys.executable, "-c", ""]).usable for _ in range(20))


@serial
@pytest.mark.parametrize(("variable", "value", "said"), [
    ("MPICH_GPU_SUPPORT_ENABLED", "1", True), ("MPICH_GPU_SUPPORT_ENABLED", "0", False)])
def test_cray_says_it_by_a_variable(variable: str, value: str, said: bool) -> None:
    assert aware.asked({variable: value}) is said


@serial
def test_the_library_is_asked_where_it_lies() -> None:
    assert aware.asked({}) in (True, False)
    assert aware._library(), "MPI is loaded, and its library not found"


@serial
@pytest.mark.parametrize(("visible", "local_rank", "expected"), [
    ("MIG-a,MIG-b", 0, "MIG-a"), ("MIG-a,MIG-b", 3, "MIG-b"), ("MIG-a", 1, None), ("0,1,2,3", 2, None), ("", 0, None),
])
def test_each_rank_has_its_mig_instance(visible: str, local_rank: int, expected: str | None) -> None:
    assert placement.mig({"CUDA_VISIBLE_DEVICES": visible}, local_rank) == expected


@serial
def test_devices_that_ranks_share_are_found() -> None:
    assert placement.doubled(["a", "b", "a", "c"]) == {"a": [0, 2]}
    assert placement.doubled(["", "", ""]) == {}, "hosts are shared by nature"


@pytest.mark.ranks(min=2)
def test_sharing_a_gpu_without_saying_so_is_refused_on_all_ranks(comm: MPI.Comm) -> None:
    with session() as world:
        with pytest.raises(UserError, match=r"one and the same GPU \(GPU-1\).*--run\.share_gpu true"):
            device._sharers(Config(), world, "GPU-1")
        assert device._sharers(Config(run=Run(share_gpu=True)), world, "GPU-1") == comm.size
        assert device._sharers(Config(), world, f"GPU-{world.rank}") == 1


@serial
@pytest.mark.parametrize(("parallel", "message"), [
    (Parallel(tp=2), r"--parallel\.tp 2 does not keep to\. Give --parallel\.tp 1"),
    (Parallel(pp=2), r"--parallel\.pp 2 does not keep to\. Give --parallel\.pp 1"),
    (Parallel(schedule="zb"), r"Give --parallel\.schedule 1f1b, or --run\.graphs false"),
    (Parallel(recompute=True), r"Give --parallel\.recompute false"),
])
def test_what_graphs_do_not_go_with_is_refused(parallel: Parallel, message: str) -> None:
    with pytest.raises(UserError, match=message):
        device.check_graphs(parallel)


@serial
@pytest.mark.parametrize("parallel", [Parallel(pp=2, cp=2), Parallel(pp=2, tp=2)])
def test_stages_of_teams_and_rings_need_an_mpi_that_knows_gpus(parallel: Parallel) -> None:
    device._check_way(parallel, "device")
    device._check_way(replace(parallel, pp=1), "staged")
    with pytest.raises(UserError, match=r"needs an MPI that is given the GPUs' memory"):
        device._check_way(parallel, "staged")


@serial
def test_an_mpi_for_one_thread_is_refused_on_gpus() -> None:
    device._require_threads(MPI.THREAD_SERIALIZED)
    with pytest.raises(UserError, match="unset MPI4PY_RC_THREAD_LEVEL"):
        device._require_threads(MPI.THREAD_FUNNELED)


@serial
def test_graphs_are_refused_on_a_host(comm: MPI.Comm) -> None:
    with session() as world, pytest.raises(UserError, match=r"--run\.graphs true: CUDA graphs are for GPUs"):
        device.transport(Config(run=Run(graphs=True, device="host")), world)


@serial
@pytest.mark.parametrize("name", device.ALLOCATOR)
def test_expandable_segments_are_refused(name: str) -> None:
    device.require_fixed_segments({name: "expandable_segments:False"})
    with pytest.raises(UserError, match=r"expandable segments\. Unset it"):
        device.require_fixed_segments({name: "max_split_size_mb:64, expandable_segments: True"})


@serial
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_a_mistake(run_mpi) -> None:
    result = run_mpi(0, ["-m", "mpilm.train", "--run.device", "cuda", "--run.steps", "1"])
    assert (result.rc, "Traceback" in result.stderr) == (2, False), result
    assert "--run.device cuda: no GPU is to be seen" in result.stderr


def test_values_come_and_go(comm: MPI.Comm) -> None:
    """What checkpoints read and write of any device."""
    late = Late(comm.rank)
    held, values = late.zeros(100, np.float32), np.arange(100, dtype=np.float32)
    arrays.put(values[10:20], held[10:20])
    np.add(held, 1, out=held)
    target = np.empty(10, np.float32)
    assert arrays.fetch(held[10:20], target) is target
    assert (target == values[10:20] + 1).all()
