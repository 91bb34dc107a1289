"""Loader: the sequences of my slots of a step, read ahead by one thread.

    loader = Loader(data, sampler, sequence_length=256, micro_batch_size=4, slots=range(2, 4))
    batch = loader.batch(step)       # batch.inputs [2, 4, 256], batch.targets the same, one token on

A slot is a micro-batch's place in the global batch: slot s of a step is the sequences ids[s*m : (s+1)*m], whichever
rank has it. Sequence i is the tokens [i*T, (i+1)*T] of the stream: T inputs, and the same T shifted by one as targets.

While a step is computed, the thread prepares the next one; nothing is forked. An error in the thread is raised by the
`batch` that would have returned its result.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from mpilm.data.sampler import Order
from mpilm.data.shards import Dataset


class Batch(NamedTuple):
    """What a rank computes on in a step. All [num_slots, micro_batch_size, sequence_length] int64.

    `inputs` and `targets` are views of one array, a token apart, so their rows are not adjacent in memory.
    `documents` numbers the documents within each row from 0 (None unless asked for). Without targets a model makes
    its outputs, not losses.
    """

    inputs: np.ndarray
    targets: np.ndarray | None
    documents: np.ndarray | None


class Loader:
    """Batches of consecutive steps; any other step works too, it only is not prepared ahead. Close it after use.

    A step whose order has fewer sequences has fewer slots.
    """

    def __init__(self, dataset: Dataset, sampler: Order, *, sequence_length: int, micro_batch_size: int,
                 slots: range, mask_documents: bool = False) -> None:
        self._dataset, self._sampler = dataset, sampler
        self._sequence_length, self._micro_batch_size = sequence_length, micro_batch_size
        self._slots, self._mask_documents = slots, mask_documents
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def batch(self, step: int) -> Batch:
        """The batch of a step. Starts reading the one after it.

        Raises:
            UserError: The data turned out to be damaged.
        """
        if self._ahead is None or self._ahead[0] != step:
            self._ahead = step, self._thread.submit(self._load, step)
        current = self._ahead[1]
        self._ahead = step + 1, self._thread.submit(self._load, step + 1)
        return current.result()

    def _load(self, step: int) -> Batch:
        size, length = self._micro_batch_size, self._sequence_length
        slots = slice(self._slots.start, self._slots.stop, self._slots.step)
        ids = self._sampler.ids(step).reshape(-1, size)[slots]
        starts = ids.reshape(-1) * length
        shape = (len(ids), size, length)
        tokens = self._dataset.windows(starts, length + 1).reshape(*shape[:2], length + 1)
        documents = self._documents(starts).reshape(shape) if self._mask_documents else None
        return Batch(tokens[..., :-1], tokens[..., 1:], documents)

    def _documents(self, starts: np.ndarray) -> np.ndarray:
        length = self._sequence_length
        rows = np.empty((starts.size, length), np.int64)
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = self._dataset.documents(start, length)
        return rows - rows[:, :1]

    def close(self) -> None:
        """End the thread; what it was preparing is dropped."""
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._ahead = None

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
