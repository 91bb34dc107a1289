"""The figures of a benchmark as text: a block a case, a row a contender, ours divided by everyone else.

    64MiB          GB/s    /mpi   /gloo
    shared         8.10    3.24    5.61
    mpi            2.50
    gloo           1.44
"""

from __future__ import annotations

from collections.abc import Collection


class Table:
    """Collects figures and lays them out.

    Args:
        name: Of the benchmark.
        ours: Contenders whose rows get ratios to all the others.
    """

    def __init__(self, name: str, *, ours: Collection[str]) -> None:
        self.name = name
        self.ours = ours
        self._cases: dict[tuple[str, str], dict[str, float]] = {}

    def add(self, case: str, who: str, value: float, unit: str) -> None:
        """Take one figure."""
        self._cases.setdefault((case, unit), {})[who] = value

    def text(self) -> str:
        """All of it, one block a case and unit, in the order in which they came."""
        return "\n\n".join(self._block(case, unit, values) for (case, unit), values in self._cases.items())

    def _block(self, case: str, unit: str, values: dict[str, float]) -> str:
        peers = [who for who in values if who not in self.ours]
        width = max(12, *(len(name) + 2 for name in (case, *values)))
        columns = [max(9, len(who) + 3) for who in peers]
        lines = [case.ljust(width) + unit.rjust(12) + _row([f"/{who}" for who in peers], columns)]
        for who, value in values.items():
            ratios = [_ratio(value, values[peer]) for peer in peers] if who in self.ours else []
            lines.append((who.ljust(width) + f"{value:12.4g}" + _row(ratios, columns)).rstrip())
        return "\n".join(lines)


def _ratio(value: float, peer: float) -> str:
    return f"{value / peer:.2f}" if peer else "-"


def _row(cells: list[str], columns: list[int]) -> str:
    return "".join(cell.rjust(width) for cell, width in zip(cells, columns, strict=False))
