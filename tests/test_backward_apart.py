"""Backward passes in a thread of their own, as PyTorch has one for every GPU, with messages in them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from mpi4py import MPI

from mpilm.comm.devices import HOST
from mpilm.comm.transport import Direct, Staged
from tests.comm.late import Late
from tests.device_cases import on
from tests.helpers import everywhere
from tests.training_cases import alone, apart, configuration, divisible, parallel, same

pytestmark = pytest.mark.usefixtures("backward_apart")
ROUNDING = {"fp32": 1e-6, "bf16": 0.02}     # relative


@pytest.fixture
def backward_apart(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Backward passes in a thread of their own, as PyTorch has one for a GPU."""
    with ThreadPoolExecutor(1, "backward") as thread:
        def apart(run: Callable[..., Any]) -> Callable[..., Any]:
            def there(*args: Any, **options: Any) -> Any:
                if threading.current_thread().name.startswith("backward"):
                    return run(*args, **options)
                return thread.submit(run, *args, **options).result()
            return there
        for name in ("backward", "grad"):
            monkeypatch.setattr(torch.autograd, name, apart(getattr(torch.autograd, name)))
        yield


@pytest.mark.turns(at=(3, 4))
@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_rings_send_through_the_host(precision: str, comm: MPI.Comm) -> None:
    """In pieces of a few rows, in the forward and in the backward pass."""
    config = configuration("shared", cp=comm.size)
    found = on(Staged(HOST, piece_bytes=1024), config, precision)
    everywhere(comm, same(parallel(config, precision=precision), found), f"{found[:2]}")


@pytest.mark.ranks(min=2, max=3)
@pytest.mark.parametrize(("precision", "name", "how"), [
    ("fp32", "shared", Staged), ("fp32", "ring", Direct), ("bf16", "shared", Direct), ("bf16", "ring", Staged)])
def test_teams_exchange_a_device_s_arrays(precision: str, name: str, how: type, comm: MPI.Comm) -> None:
    """The same sums as those of a host's messages."""
    config = divisible(name, tp=comm.size, reproducible=False)
    found = on(how(Late(prompt=True)), config, precision)
    everywhere(comm, apart(found, parallel(config, precision=precision)) < ROUNDING[precision], f"{found[:2]}")


@pytest.mark.parametrize("recompute", [False, True])
def test_split_backward_passes_go_on_in_their_thread(recompute: bool, comm: MPI.Comm) -> None:
    """Which does not know what the thread that began them has in its context."""
    found = parallel(configuration("shared", pp=comm.size, schedule="zb", recompute=recompute))
    everywhere(comm, same(alone(configuration()), found), f"{found[:2]}")
