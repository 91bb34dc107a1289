"""How a rank's queries and the keys it meets are cut into tiles of scores, of bounded size.

    tiles = Tiles(rank, q, kv_heads=2, documents=None)
    tiles.split(q)                          [N, R, D] for each tile of queries
    for row, place, hidden in tiles.visible(owner): ...      tile `row` looks at the tokens `place` of that rank's keys
    tiles.join(parts)                       back to [B, T, H, D]

B sequences, T tokens of a rank (its early chunk, then its late one), H heads, K kv_heads, D head_width; N = K x B,
R = tokens of a tile x H / K. Every rank cuts its chunks alike.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import isqrt

import torch
from torch import Tensor

from mpilm.parallel import zigzag

# Of a tile, over all heads and sequences, about: 4 MiB of float32, a core's share of a cache; 64 MiB, so that a kernel
# keeps a GPU busy.
SCORES, SCORES_OF_GPU = 1 << 20, 1 << 24
LEAST = 64              # tokens: smaller products are slow whatever the memory


class Tiles:
    """The tiles of rank `rank`.

    Args:
        rank: Of the ranks that share the sequence.
        q: Queries [B, T, H, D], for their shape.
        kv_heads: K.
        documents: [ranks, B, T] integers, of every rank's tokens; attention stays among equal ones. None: no matter.
    """

    def __init__(self, rank: int, q: Tensor, *, kv_heads: int, documents: Tensor | None) -> None:
        self.rank, self.kv_heads, self.documents, self.shape = rank, kv_heads, documents, q.shape
        batch, tokens, heads, _ = q.shape
        chunk = tokens // 2
        scores = SCORES if q.device.type == "cpu" else SCORES_OF_GPU
        cuts = zigzag.cuts(chunk, max(LEAST, isqrt(scores // (batch * heads))))
        self.count = len(cuts)
        self.places = [slice(start + cut.start, start + cut.stop) for start in (0, chunk) for cut in cuts]
        order = torch.arange(max(place.stop - place.start for place in self.places), device=q.device)
        self.future = (order[:, None] < order[None, :])[None, None]

    def split(self, x: Tensor) -> list[Tensor]:
        """[B, T, H, any] -> [N, R, any] of every tile of queries."""
        rows = x.unflatten(2, (self.kv_heads, -1)).permute(2, 0, 3, 1, 4)       # K B H/K T any
        return [rows[:, :, :, place].flatten(0, 1).flatten(1, 2).contiguous() for place in self.places]

    def join(self, parts: list[Tensor]) -> Tensor:
        """[N, R, D] of every tile -> [B, T, H, D]."""
        batch, tokens, heads, width = self.shape
        joined = parts[0].new_empty(batch, tokens, heads, width)
        rows = joined.unflatten(2, (self.kv_heads, -1)).permute(2, 0, 3, 1, 4)
        for place, part in zip(self.places, parts, strict=True):
            into = rows[:, :, :, place]
            into.copy_(part.view(into.shape))
        return joined

    def visible(self, owner: int) -> Iterator[tuple[int, slice, Tensor | None]]:
        """(tile of my queries, tokens of `owner`'s keys, what of them is hidden: see `online.scores`)."""
        for pair in zigzag.pairs(self.rank, owner):
            for tile in zigzag.tiles(pair, self.count):
                row, column = pair.queries * self.count + tile.queries, pair.keys * self.count + tile.keys
                yield row, self.places[column], self._hidden(owner, row, column, diagonal=tile.diagonal)

    def _hidden(self, owner: int, row: int, column: int, *, diagonal: bool) -> Tensor | None:
        mine, theirs = self.places[row], self.places[column]
        future = self.future[..., :mine.stop - mine.start, :theirs.stop - theirs.start] if diagonal else None
        if self.documents is None:
            return future
        here, there = self.documents[self.rank, :, mine], self.documents[owner, :, theirs]
        others = (here[:, :, None] != there[:, None, :])[:, None]
        return others if future is None else others | future
