"""What a rank has of the model's layers: how much of each, and what it hears from others; here, a rank that has all.

The model asks this of its split and does not know whether ranks share its layers. `Alone` has every layer whole.
`parallel/tensor.py` has the team, whose ranks have a size-th of each matrix; between the matrices, where norms and
residuals are, a rank has a size-th of the tokens.

    my tokens -> gather -> matrix, a size-th of its outputs -> matrix, a size-th of its inputs -> scatter -> my tokens
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from mpilm.model.softmax import Softmax


class Alone:
    """A rank that has whole layers.

    Attributes:
        size: Ranks that share the layers.
        rank: My number among them.
    """

    size = 1
    rank = 0

    def of(self, count: int) -> int:
        """How many of `count` outputs (or inputs, or heads) of a layer are mine."""
        return count // self.size

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's tokens, [B, T, C], of mine, [B, T / size, C]."""
        return x

    def scatter(self, x: Tensor) -> Tensor:
        """My tokens, [B, T / size, C], of the sum of everyone's [B, T, C]."""
        return x

    def common(self, weight: Tensor) -> Tensor:
        """`weight`, which everyone has and uses for its own tokens: its gradient is the sum of everyone's."""
        return weight

    def embed(self, tokens: Tensor, table: Tensor, *, sparse: bool) -> Tensor:
        """The rows of my tokens, [B, T / size, C], of all `tokens` [B, T]; mine of the table are [V / size, C]. Its
        gradient may be a sparse tensor."""
        return F.embedding(tokens, table, sparse=sparse)

    def softmax(self, vocab_size: int) -> Softmax:
        """What the head makes of logits over my part of the vocabulary."""
        return Softmax()


ALONE = Alone()
