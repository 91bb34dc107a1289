"""Files of a run damaged at random: named, and an older checkpoint is used; or it makes no difference."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from mpilm.checkpoint import Alone, Reader, newest
from mpilm.log import UserError
from tests.chaos.damage import DAMAGE, SPARSE, flip
from tests.chaos.jobs import Job
from tests.chaos.kills import Trial

Values = dict[str, np.ndarray]


def damaged(trials: int, draw: random.Random, data: Path, folder: Path) -> Iterator[Trial]:
    """One to three files of the two newest checkpoints of a run."""
    with Job(2, data, folder / "whole", **{"checkpoint.keep_last": 2}) as job:
        assert job.wait() == 0, job.words.read_text()
    source, copy = folder / "whole" / "checkpoints", folder / "damaged"
    known = {path.name: _values(Reader(path)) for path in source.iterdir()}
    for _ in range(trials):
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(source, copy)
        done = [_damage(copy, draw) for _ in range(draw.choice([1, 1, 2, 3]))]
        yield Trial(", ".join(done), _problem(copy, known))


def _damage(directory: Path, draw: random.Random) -> str:
    files = [path for path in sorted(directory.rglob("*"))
             if path.is_file() and not path.is_symlink() and path.stat().st_size < SPARSE]
    victim = draw.choice(files)
    others = [path for path in files if path != victim]
    kind = draw.choice([*DAMAGE, *["a bit"] * len(DAMAGE)])
    size = victim.stat().st_size
    if kind != "a bit" or not size:
        kind = kind if kind in DAMAGE else "removed"
        DAMAGE[kind](victim, others)
        return f"{victim.relative_to(directory)} {kind}"
    bit = draw.randrange(8 * size)
    flip(victim, bit)
    return f"{victim.relative_to(directory)} bit {bit}"


def _problem(directory: Path, known: dict[str, Values]) -> str:
    told: list[str] = []
    try:
        reader = newest(directory, Alone(), tell=told.append)
    except UserError as error:
        return "" if str(directory) in str(error) else f"an error that names nothing: {error}"
    if reader is None:
        return "no checkpoint, and no word of it"
    best = max(known)
    if reader.path.name != best and not any(best in text for text in told):
        return f"{reader.path.name} instead of {best}, and no word of it"
    values = _values(reader)
    wrong = [name for name, array in known[reader.path.name].items() if values[name].tobytes() != array.tobytes()]
    return f"silently wrong: {', '.join(wrong)}" if wrong or set(values) != set(known[best]) else ""


def _values(reader: Reader) -> Values:
    return {name: reader.read(name, 0, int(np.prod(tensor.shape))).copy() for name, tensor in reader.tensors.items()}
