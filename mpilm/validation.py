"""Validation loss: always over the same tokens, dealt to ranks in micro-batches like a step's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from mpilm.comm.order import even_runs
from mpilm.data.loader import Batch, Loader
from mpilm.data.sampler import Spread
from mpilm.data.shards import Dataset
from mpilm.log import UserError
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline

TOKENS = 1 << 18  # of a rank in memory at a time, about: the split may be larger than that


class Validation:
    """`sequences` sequences, evenly spaced over the validation split, in whole micro-batches (see `divided`).

    Collective over `comm`, the ranks that hold the same parameters, and over the ranks of each pipeline.

    Args:
        share: So many ranks of `comm`, one next to the other, share every sequence.
        averaged: The pipeline's parameters are the same on all ranks of `comm` in such a block.

    Attributes:
        dataset: What it is measured on.
        tokens, of: So many that are evaluated, of those that were wanted and are there.

    Raises:
        UserError: The validation split is shorter than one sequence.
    """

    def __init__(self, dataset: Dataset, pipeline: Pipeline, comm: Any, *, sequences: int, sequence_length: int,
                 micro_batch_size: int, mask_documents: bool, share: int = 1,
                 averaged: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        available = (dataset.num_tokens - 1) // sequence_length
        if available < 1:
            raise UserError(f"The validation split has {dataset.num_tokens} tokens, less than one sequence of "
                            f"{sequence_length}: encode with a larger --validation, or --log.validate_every 0.")
        size, slots = divided(min(sequences, available), micro_batch_size)
        runs = even_runs(slots, comm.size // share)
        self.dataset, self.pipeline, self.losses = dataset, pipeline, Losses(comm, runs, pipeline.comm)
        self.averaged = averaged
        self._found: dict[int, float] = {}
        self.tokens, self.of = slots * size * sequence_length, min(sequences, available) * sequence_length
        mine = runs[comm.rank // share]
        self.together = max(1, TOKENS // (size * sequence_length))
        order = Spread(available, count=slots * size, mine=range(mine.start * size, mine.stop * size),
                       a_step=self.together * size)
        self.rounds = max(map(len, runs))
        self.loader = Loader(dataset, order, sequence_length=sequence_length, micro_batch_size=size,
                             slots=range(self.together), mask_documents=mask_documents)

    def after(self, step: int) -> float:
        """`loss` after so many steps, measured once."""
        if step not in self._found:
            self._found = {step: self.loss()}
        return self._found[step]

    def loss(self) -> float:
        """Mean loss, nats per token."""
        losses = [np.empty(0)]
        with self.averaged():
            for number, first in enumerate(range(0, self.rounds, self.together)):
                batch = self.loader.batch(number)
                passes = filled(batch, min(self.together, self.rounds - first))
                losses.append(self.pipeline.evaluate(passes)[:len(batch.inputs)])
        return self.losses.mean(np.concatenate(losses))


def divided(count: int, most: int) -> tuple[int, int]:
    """`count` sequences in micro-batches of at most `most` and about as many: how many each has, and their number, so
    that few are left over.

    >>> divided(64, 8), divided(12, 8), divided(5, 8)
    ((8, 8), (6, 2), (5, 1))
    """
    most = min(most, count)
    size = min(range(most, most // 2, -1), key=lambda size: count % size)
    return size, count // size


def filled(batch: Batch, slots: int) -> Batch:
    """With slots of zeros at the end: ranks may have weights to gather together, so all do as many passes."""
    def longer(array: np.ndarray) -> np.ndarray:
        return np.append(array, np.zeros((slots - len(array), *array.shape[1:]), array.dtype), 0)

    assert batch.targets is not None
    documents = None if batch.documents is None else longer(batch.documents)
    return Batch(longer(batch.inputs), longer(batch.targets), documents)
