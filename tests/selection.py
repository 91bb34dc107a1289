"""Which tests a number of ranks has: by their markers, the same on all ranks.

    @pytest.mark.serial                     needs one rank, and runs only there
    @pytest.mark.ranks(min=2, max=3)        only on so many
    @pytest.mark.turns(at=(3, 4))           of its cases 3 and 4 ranks have one half each, any other number has all

Cases are dealt along diagonals of their parameters, so that every value of one meets different values of another.
"""

from __future__ import annotations

import pytest


def fits(item: pytest.Item, size: int) -> bool:
    """Whether a test is for so many ranks, and this one its turn."""
    wanted = item.get_closest_marker("ranks")
    assert wanted is None or not wanted.args, f"{item.nodeid}: write ranks(min=..., max=...)"
    limits = wanted.kwargs if wanted else {}
    most = 1 if item.get_closest_marker("serial") else limits.get("max", size)
    return limits.get("min", 1) <= size <= most and _has_its_turn(item, size)


def _has_its_turn(item: pytest.Item, size: int) -> bool:
    wanted = item.get_closest_marker("turns")
    if wanted is None or size not in wanted.kwargs["at"]:
        return True
    at = wanted.kwargs["at"]
    return sum(item.callspec.indices.values()) % len(at) == at.index(size)  # type: ignore[attr-defined]
