"""Checkpoints of model + AdamW in float32: ours against torch.save and safetensors from rank 0.

    mpirun -np 2 python -m mpilm.bench checkpoint              # TMPDIR=/scratch/me chooses the disk

Cases, for the state of a model of the size of the reference GPT (14 M parameters, 168 MB):
    stall          seconds that training stands still: for ours the time in `save`, for the others all of it
    training       seconds that one save adds to 10 steps of matrix products, the work of our threads included
    save           GB/s until the checkpoint is complete; ours is then on the disk, theirs in the page cache
    save to disk   the same with everyone's fsync
    load           GB/s until every rank has all weights and its share of the optimizer; ours has compared checksums
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpilm.bench.measure import interleaved, timed
from mpilm.checkpoint import Piece, Writer, newest

OURS = ("mpilm",)
PARAMETERS = 14_000_000
TENSORS = 48
STATES = ("model", "adam_m", "adam_v")
ROUNDS = 5
STEPS = 10
WIDTH = 512
PRODUCTS = 20

Emit = Callable[[str, str, float, str], None]
State = dict[str, np.ndarray]


def run(comm: MPI.Comm, emit: Emit) -> None:
    """Measure every case. Collective over `comm`."""
    directory = Path(comm.bcast(tempfile.mkdtemp(prefix="mpilm-bench-") if comm.rank == 0 else None))
    try:
        _measure(comm, emit, directory, _state())
    finally:
        if comm.rank == 0:
            shutil.rmtree(directory, ignore_errors=True)


def _state() -> State:
    """Random bits, as weights are; the same on every rank."""
    draw = np.random.default_rng(0)
    shape = (PARAMETERS // TENSORS // WIDTH, WIDTH)
    return {f"{state}.layers.{number}.weight": draw.standard_normal(shape, np.float32)
            for state in STATES for number in range(TENSORS)}


def _measure(comm: MPI.Comm, emit: Emit, directory: Path, state: State) -> None:
    writer = Writer(directory / "ours", comm.Dup(), keep_last=1)
    pieces = _share(comm, state)
    writer.reserve(pieces)
    nbytes = sum(array.nbytes for array in state.values())
    stalls: list[float] = []

    def ours() -> None:
        writer.save(0, pieces, {})
        saved = writer.wait()
        assert saved is not None
        stalls.append(comm.allreduce(saved.stall_s, op=MPI.MAX))

    peers = _peers(comm, directory, state)
    usual = interleaved(comm, {"mpilm": ours, **{name: save for name, (save, _) in peers.items()}}, rounds=ROUNDS)
    durable = {name: _then_fsync(comm, save, directory / name) for name, (save, _) in peers.items()}
    to_disk = interleaved(comm, {"mpilm": ours, **durable}, rounds=ROUNDS)
    for who, seconds in {**usual, "mpilm": statistics.median(stalls)}.items():
        emit("stall", who, seconds, "s")
    for who, seconds in _in_training(comm, writer, pieces, {name: save for name, (save, _) in peers.items()}).items():
        emit("training", who, seconds, "s")
    loads = {"mpilm": lambda: _load(comm, directory / "ours"), **{name: load for name, (_, load) in peers.items()}}
    loading = interleaved(comm, loads, rounds=ROUNDS)
    comm.Barrier()
    for case, times in (("save", usual), ("save to disk", to_disk), ("load", loading)):
        for who, seconds in times.items():
            emit(case, who, nbytes / seconds / 1e9, "GB/s")


def _share(comm: MPI.Comm, state: State) -> list[Piece]:
    """This rank's part of every tensor."""
    pieces = []
    for name, array in state.items():
        start, stop = (array.size * rank // comm.size for rank in (comm.rank, comm.rank + 1))
        pieces.append(Piece(name, array.shape, start, array.reshape(-1)[start:stop]))
    return pieces


def _load(comm: MPI.Comm, directory: Path) -> State:
    reader = newest(directory, comm)
    assert reader is not None
    loaded = {}
    for name, tensor in reader.tensors.items():
        start, stop = _wanted(comm, name, tensor.size)
        loaded[name] = reader.read(name, start, stop - start)
    return loaded


def _wanted(comm: MPI.Comm, name: str, size: int) -> tuple[int, int]:
    """All of a weight, a share of the optimizer's state."""
    if name.startswith("model."):
        return 0, size
    return size * comm.rank // comm.size, size * (comm.rank + 1) // comm.size


def _peers(comm: MPI.Comm, directory: Path,
           state: State) -> dict[str, tuple[Callable[[], object], Callable[[], object]]]:
    """How people save from rank 0 and load on every rank."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors = {name: torch.from_numpy(array) for name, array in state.items()}
    pickled, safe = directory / "torch.save", directory / "safetensors"

    def load_safe() -> State:
        with safe_open(safe, "np") as file:
            return {name: file.get_slice(name)[slice(*_rows(comm, name, array))] for name, array in state.items()}

    return {
        "torch.save": (_on_root(comm, partial(torch.save, tensors, pickled)),
                       partial(torch.load, pickled, weights_only=True)),
        "safetensors": (_on_root(comm, partial(save_file, tensors, safe)), load_safe),
    }


def _on_root(comm: MPI.Comm, save: Callable[[], object]) -> Callable[[], object]:
    return save if comm.rank == 0 else lambda: None


def _rows(comm: MPI.Comm, name: str, array: np.ndarray) -> tuple[int, int]:
    return _wanted(comm, name, array.shape[0])


def _then_fsync(comm: MPI.Comm, save: Callable[[], object], path: Path) -> Callable[[], None]:
    def durable() -> None:
        save()
        if comm.rank == 0:
            with path.open("rb") as file:
                os.fsync(file.fileno())

    return durable


def _in_training(comm: MPI.Comm, writer: Writer, pieces: list[Piece],
                 peers: Mapping[str, Callable[[], object]]) -> dict[str, float]:
    """Seconds that one save adds to some steps of work, by contender; medians."""
    matrix = np.random.default_rng(comm.rank).standard_normal((WIDTH, WIDTH), np.float32)
    product = np.empty_like(matrix)

    def steps(save: Callable[[], object]) -> None:
        save()
        for _ in range(STEPS):
            for _ in range(PRODUCTS):
                np.matmul(matrix, matrix, out=product)
            comm.Barrier()
            writer.poll()

    saves: dict[str, Callable[[], object]] = {
        "nothing": lambda: None, "mpilm": lambda: writer.save(0, pieces, {}), **peers}
    times: dict[str, list[float]] = {who: [] for who in saves}
    for _ in range(ROUNDS):
        for who, save in saves.items():
            times[who].append(timed(comm, lambda save=save: steps(save)))  # type: ignore[misc]
            writer.wait()
    medians = {who: statistics.median(seen) for who, seen in times.items()}
    return {who: seconds - medians["nothing"] for who, seconds in medians.items() if who != "nothing"}
