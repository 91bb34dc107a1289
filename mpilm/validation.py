"""Validation loss: always over the same tokens, dealt to ranks in micro-batches like a step's."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpilm.comm.order import even_runs
from mpilm.data.loader import Loader
from mpilm.data.sampler import Spread
from mpilm.data.shards import Dataset
from mpilm.log import UserError
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline

TOKENS = 1 << 18  # of a rank in memory at a time, about: the split may be larger than that


class Validation:
    """`sequences` sequences, evenly spaced over the validation split, in whole micro-batches.

    Collective over `comm`, the data-parallel communicator, and over the ranks of each pipeline.

    Raises:
        UserError: The validation split is shorter than one sequence.
    """

    def __init__(self, dataset: Dataset, pipeline: Pipeline, comm: Any, *, sequences: int, sequence_length: int,
                 micro_batch_size: int, mask_documents: bool) -> None:
        available = (dataset.num_tokens - 1) // sequence_length
        if available < 1:
            raise UserError(f"The validation split has {dataset.num_tokens} tokens, less than one sequence of "
                            f"{sequence_length}: encode with a larger --validation, or --log.validate_every 0.")
        size = min(micro_batch_size, available)
        slots = max(1, min(sequences, available) // size)
        runs = even_runs(slots, comm.size)
        self.pipeline, self.losses = pipeline, Losses(comm, runs, pipeline.comm)
        self.tokens = slots * size * sequence_length
        mine = runs[comm.rank]
        together = max(1, TOKENS // (size * sequence_length))
        order = Spread(available, count=slots * size, mine=range(mine.start * size, mine.stop * size),
                       a_step=together * size)
        self.batches = -(-len(mine) // together)
        self.loader = Loader(dataset, order, sequence_length=sequence_length, micro_batch_size=size,
                             slots=range(together), mask_documents=mask_documents)

    def loss(self) -> float:
        """Mean loss, nats per token."""
        losses = [self.pipeline.evaluate(self.loader.batch(number)) for number in range(self.batches)]
        return self.losses.mean(np.concatenate([np.empty(0), *losses]))
