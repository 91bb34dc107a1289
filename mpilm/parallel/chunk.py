"""A chunk: the part of a model that is one stage of a pipeline, such as `model.gpt.GPT` and `parallel.layers.Layers`.

    output = chunk(inputs, targets, extra, hidden)

The first chunk takes a slot's inputs, every other one `hidden`, what the chunk before has made. All but the last return
activations; the last returns the slot's mean loss, a scalar, or without targets the model's output.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor, nn


class Chunk(Protocol):
    """What the executor asks of a chunk; a torch module has most of it."""

    training: bool

    @property
    def last(self) -> bool:
        """Its output is a loss."""

    def input_shape(self, stage: int, slot: Sequence[int]) -> tuple[int, ...]:
        """Of the activations that enter `stage`, from 1, whichever chunk this is; `slot`: shape of a slot's inputs."""

    def rows(self, slot: Sequence[int]) -> tuple[int, ...]:
        """What of a slot, whose inputs have the shape `slot`, this rank computes with: rows of its linear layers."""

    def linear_rows(self) -> Mapping[nn.Linear, tuple[int, ...]] | None:
        """Linear layers whose weight gradients can be computed later, and the rows each sees: see `deferred.Deferred`.
        """

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names they have in the whole model."""

    def train(self) -> Any:
        """Training mode, in which graphs are kept."""

    def eval(self) -> Any:
        """Evaluation mode."""

    def __call__(self, inputs: Tensor, targets: Tensor | None, extra: Tensor | None, hidden: Tensor | None) -> Tensor:
        """One slot forward."""
