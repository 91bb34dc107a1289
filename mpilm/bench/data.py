"""Reading: random windows of 1,024 tokens and their targets, ours against a loop over a NumPy memory map.

    mpirun -np 2 python -m mpilm.bench data              # TMPDIR=/scratch/me chooses the disk

Everyone reads the same 32 million tokens from a warm page cache and hands out int64 inputs and targets, a batch of 16
or of 64 windows at a time, on every rank at once. Values are windows/s over all ranks, medians over the rounds.
    mpilm          Dataset.windows: HDF5 shards, mapped
    mpilm-loader   Loader.batch: the same with the sampler, the prefetch thread and nothing to hide behind
    memmap         what nanoGPT does, np.stack over slices of np.memmap, the map kept open
    h5py           the same loop over slices of an h5py dataset
"""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from mpi4py import MPI

from mpilm.bench.measure import interleaved
from mpilm.data import _format, _shardfile
from mpilm.data.loader import Loader
from mpilm.data.sampler import Sampler
from mpilm.data.shards import Dataset
from mpilm.launch import on_root

OURS = ("mpilm", "mpilm-loader")
LENGTH, NUM_TOKENS, VOCAB_SIZE = 1024, 32 << 20, 8192
BATCHES = (16, 64)
ROUNDS, WINDOWS = 7, 16384
END_OF_TEXT = 0

Emit = Callable[[str, str, float, str], None]
Pair = tuple[np.ndarray, np.ndarray]


def run(comm: MPI.Comm, emit: Emit) -> None:
    """Measure both batch sizes. Collective over `comm`."""
    folder = Path(on_root(comm, lambda: tempfile.mkdtemp(prefix="mpilm-bench-")))
    try:
        on_root(comm, lambda: prepare(folder, NUM_TOKENS))
        for batch in BATCHES:
            with ExitStack() as stack:
                calls = {who: _repeated(read, batch) for who, read in contenders(folder, batch, stack).items()}
                for who, seconds in interleaved(comm, calls, rounds=ROUNDS).items():
                    emit(f"{batch} windows", who, comm.size * WINDOWS / seconds, "windows/s")
    finally:
        comm.Barrier()
        on_root(comm, lambda: shutil.rmtree(folder))


def prepare(folder: Path, num_tokens: int) -> None:
    """Write random tokens twice: as a dataset and as the bare file that nanoGPT maps."""
    tokens = np.random.default_rng(0).integers(1, VOCAB_SIZE, num_tokens).astype("<u2")
    tokens[-1] = END_OF_TEXT
    tokens.tofile(folder / "tokens.bin")
    (folder / _format.TOKENIZER).write_bytes(b"{}")
    digest = hashlib.sha256(b"{}").hexdigest()
    name = _format.shard_name("train", 0)
    line = _format.Shard(name, num_tokens, 1, 0, 1, digest)
    sketch = _format.Index(VOCAB_SIZE, END_OF_TEXT, digest, {"train": [line]})
    values = _shardfile.attributes(sketch, "train", 0, first_document=0)
    shard = _shardfile.write(folder / name, values, [tokens], np.zeros(1, np.int64))
    index = _format.Index(VOCAB_SIZE, END_OF_TEXT, digest, {"train": [shard], "validation": []})
    (folder / _format.INDEX).write_bytes(index.to_bytes())


def contenders(folder: Path, batch: int, stack: ExitStack) -> dict[str, Callable[[], Pair]]:
    """By name, what reads one batch: inputs and targets [batch, LENGTH] int64. `stack` closes what they opened."""
    import h5py

    dataset = Dataset.open(folder)
    sampler = Sampler(dataset.num_sequences(LENGTH), global_batch_size=batch, seed=1)
    loader = stack.enter_context(Loader(dataset, sampler, sequence_length=LENGTH, micro_batch_size=batch,
                                        slots=range(1)))
    steps = iter(range(1 << 60))
    draw = np.random.default_rng(1)
    mapped = np.memmap(folder / "tokens.bin", np.uint16, "r")
    file = stack.enter_context(h5py.File(folder / _format.shard_name("train", 0), "r", locking=False))

    def starts() -> np.ndarray:
        return draw.integers(0, dataset.num_tokens - LENGTH, batch)

    def ours() -> Pair:
        rows = dataset.windows(starts(), LENGTH + 1)
        return rows[:, :-1], rows[:, 1:]

    def loaded() -> Pair:
        got = loader.batch(next(steps))
        assert got.targets is not None
        return got.inputs[0], got.targets[0]

    return {"mpilm": ours, "mpilm-loader": loaded, "memmap": lambda: _stacked(mapped, starts()),
            "h5py": lambda: _stacked(file["tokens"], starts())}


def _stacked(tokens: Any, starts: np.ndarray) -> Pair:
    """nanoGPT's get_batch."""
    return (np.stack([tokens[start:start + LENGTH].astype(np.int64) for start in starts]),
            np.stack([tokens[start + 1:start + 1 + LENGTH].astype(np.int64) for start in starts]))


def _repeated(read: Callable[[], Pair], batch: int) -> Callable[[], None]:
    def call() -> None:
        for _ in range(WINDOWS // batch):
            read()

    return call
