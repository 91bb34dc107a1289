"""What there is to run: python -m mpilm."""

from __future__ import annotations

import ast
from importlib.util import find_spec
from pathlib import Path

COMMANDS = ("data_prep.tokenizer", "data_prep.encode", "data_prep.verify", "mpilm.train", "mpilm.evaluate",
            "mpilm.generate", "mpilm.export", "mpilm.inspect", "mpilm.plan", "mpilm.bench.__main__")


def overview() -> str:
    """Every command with what it does, from its own first line; nothing is imported."""
    lines = [f"{name.removesuffix('.__main__'):20} {_purpose(name)}" for name in COMMANDS]
    return "\n".join(["usage: python -m COMMAND [--help], under mpirun for several ranks", "", *lines, "",
                      "mpirun -np 2 python -m mpilm.train        trains on the built-in corpus"])


def _purpose(name: str) -> str:
    spec = find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    first = str(ast.get_docstring(ast.parse(Path(spec.origin).read_text()))).splitlines()[0]
    return first.split(": ", 1)[0].rstrip(".") + "."


if __name__ == "__main__":
    print(overview())
