"""Validation loss: always over the same tokens, dealt to ranks in micro-batches like a step's."""

from __future__ import annotations

from typing import Any

from mpilm.comm.order import even_runs
from mpilm.data.loader import Loader
from mpilm.data.sampler import Spread
from mpilm.data.shards import Dataset
from mpilm.log import UserError
from mpilm.parallel.losses import Losses
from mpilm.parallel.pipeline import Pipeline


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
        self.loader = Loader(dataset, Spread(available, count=slots * size), sequence_length=sequence_length,
                             micro_batch_size=size, slots=runs[comm.rank], mask_documents=mask_documents)

    def loss(self) -> float:
        """Mean loss, nats per token."""
        return self.losses.mean(self.pipeline.evaluate(self.loader.batch(0)))
