"""Training on a GPU. Skipped where there is none; `jobs/gpu_check.sh` runs it with 1, 2 and 4 ranks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mpi4py import MPI

from mpilm import assemble
from mpilm.comm.transport import Staged, Transport
from mpilm.launch import session
from mpilm.sync import compress
from tests.comm import places
from tests.helpers import everywhere, same_everywhere
from tests.training_cases import VOCAB, alone, arithmetic, configuration, course, divisible, parallel, same, sharded

pytestmark = pytest.mark.gpu
Found = tuple[list, list, dict]
WAYS = {"allreduce": configuration, "level 1": lambda name: sharded(name, 1), "level 2": lambda name: sharded(name, 2)}
NEAR = 2e-3     # relative, after a few steps in float32 of another machine's kernels


@pytest.fixture(params=["gpu-device", "gpu-staged"])
def transport(request: pytest.FixtureRequest, comm: MPI.Comm) -> Iterator[Transport]:
    """By either way, with kernels that add in a fixed order."""
    found = places.transport(request.param, comm)
    torch.use_deterministic_algorithms(True)
    yield found
    torch.use_deterministic_algorithms(False)


def train(config: Any, transport: Transport, precision: str, *, together: bool) -> Found:
    """Steps over all ranks, or on each alone: losses, norms, parameters."""
    with session() as world:
        world = world if together else world.alone()
        shape = assemble.shape_of(config, VOCAB)
        core = assemble.build(config, world, shape, arithmetic(config, precision), transport=transport)
        assemble.restore(core, shape, config, None)
        return course(core, config)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp8"])
@pytest.mark.parametrize("way", WAYS)
def test_any_number_of_ranks_has_the_bits_of_one(
    way: str, precision: str, transport: Transport, comm: MPI.Comm
) -> None:
    if precision == "fp8" and not transport.device.fp8:
        pytest.skip("the GPU has no units for fp8")
    expected = train(configuration("shared"), Staged(transport.device), precision, together=False)
    for name in ("shared", "tree"):
        if name == "shared" or comm.size & (comm.size - 1) == 0:
            found = train(WAYS[way](name), transport, precision, together=True)
            everywhere(comm, same(found, expected), f"{name}: {found[:2]}, not {expected[:2]}")


def test_near_a_host(transport: Transport, comm: MPI.Comm) -> None:
    losses, norms, weights = train(configuration("shared"), transport, "fp32", together=True)
    wanted = alone(configuration())
    assert losses == pytest.approx(wanted[0], rel=NEAR)
    assert norms == pytest.approx(wanted[1], rel=NEAR)
    for name, value in weights.items():
        torch.testing.assert_close(value.cpu(), wanted[2][name], rtol=NEAR, atol=NEAR, msg=name)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recorded_blocks_have_the_same_bits(precision: str, transport: Transport, comm: MPI.Comm) -> None:
    config = configuration("shared")
    expected = train(config, transport, precision, together=True)
    config.run.graphs = True
    found = train(config, transport, precision, together=True)
    everywhere(comm, same(found, expected), f"{found[:2]}, not {expected[:2]}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("pp", [2])
def test_stages(pp: int, transport: Transport, comm: MPI.Comm) -> None:
    if comm.size % pp:
        pytest.skip("ranks are left over")
    expected = train(configuration("shared"), Staged(transport.device), "bf16", together=False)
    found = train(configuration("shared", pp=pp), transport, "bf16", together=True)
    everywhere(comm, same(found, (*expected[:2], {name: expected[2][name] for name in found[2]})), f"{found[:2]}")


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("axis", ["cp", "tp"])
def test_ranks_that_share_sequences_or_layers_are_near_one(axis: str, transport: Transport, comm: MPI.Comm) -> None:
    expected = train(divisible("shared"), Staged(transport.device), "fp32", together=False)
    found = train(divisible("shared", **{axis: comm.size}), transport, "fp32", together=True)
    numbers = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    everywhere(comm, all(abs(a / b - 1) < NEAR for a, b in numbers), f"{found[:2]}, not {expected[:2]}")


@pytest.mark.parametrize("fragments", [0, 2])
def test_replicas_that_train_by_themselves_are_near_a_host(
    fragments: int, transport: Transport, comm: MPI.Comm
) -> None:
    config = configuration("ring", kind="local_sgd", reproducible=False)
    config.sync.every, config.sync.outer_momentum, config.sync.fragments = 1, 0.9, fragments
    found, expected = train(config, transport, "fp32", together=True), parallel(config)
    numbers = zip(found[0] + found[1], expected[0] + expected[1], strict=True)
    everywhere(comm, all(abs(a / b - 1) < NEAR for a, b in numbers), f"{found[:2]}, not {expected[:2]}")


@pytest.mark.parametrize("code", [name for name in compress.names() if name != "none"])
def test_codes_lose_what_they_lose_on_a_host(code: str, transport: Transport, comm: MPI.Comm) -> None:
    config = configuration("ring", reproducible=False)
    config.sync.compress = code
    found, expected = train(config, transport, "fp32", together=True), parallel(config)
    same_everywhere(comm, np.array(found[:2]))
    everywhere(comm, np.allclose(found[0], expected[0], rtol=10 * NEAR), f"{found[0]}, not {expected[0]}")


@pytest.mark.serial
def test_a_run_goes_on_with_another_device(run_mpi: Any, tmp_path: Path) -> None:
    places.gpu(MPI.COMM_SELF)   # skips where there is none
    tiny = ["--model.layers", "1", "--data.sequence_length", "32", "--run.compile", "off", "--log.validate_every", "4",
            "--log.validation_sequences", "4", "--run.dir", str(tmp_path / "run")]
    for steps, device in (("4", "cuda"), ("6", "host"), ("8", "cuda")):
        result = run_mpi(1, ["-m", "mpilm.train", *tiny, "--run.steps", steps, "--run.device", device],
                         cwd=os.getcwd(), timeout=240)
        assert result.rc == 0, result
        assert f"finished at step {steps}" in result.stdout
