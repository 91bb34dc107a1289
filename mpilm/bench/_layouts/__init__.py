"""Which layouts the benchmark of memory measures: a name is made of words with hyphens between, in any combination.

    whole                       one rank has everything
    pp2, tp2, cp2, dp2          ranks along an axis; what is not named is 1
    gpipe, 1f1b, interleaved, zb    the schedule
    level1, level2, level3      the replicas' memory is divided
    ring                        replicas send messages and share no memory, as on nodes of their own
    recompute                   blocks are computed again in the backward pass

    "pp2-tp2-zb"    "dp4-level3-ring"
"""

from __future__ import annotations

import re
from math import prod

from mpilm.bench._contenders import Case, Who
from mpilm.config import Config, Data, Model, Optim, Parallel, Run, Sync
from mpilm.log import UserError

WHOLE = "whole"
AXES = ("dp", "pp", "cp", "tp")
SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb")
WORDS = re.compile(rf"{WHOLE}|ring|recompute|{'|'.join(SCHEDULES)}|level[123]|(?:{'|'.join(AXES)})[1-9]")
MEASURED = ("whole", "pp2", "pp4", "pp4-gpipe", "pp4-zb", "pp4-recompute", "tp2", "tp4", "pp2-tp2", "cp2", "dp2", "dp4",
            "dp2-level1-ring", "dp2-level2-ring", "dp2-level3-ring", "dp4-level1-ring", "dp4-level2-ring",
            "dp4-level3-ring")
MICRO_BATCHES = 8


def who(name: str) -> Who:
    """A layout as a contender.

    Raises:
        UserError: A word that is none.
    """
    for word in name.split("-"):
        if not WORDS.fullmatch(word):
            raise UserError(f"--who {name}: there is no {word!r}; a layout is made of {', '.join(AXES)} with a number, "
                            f"{', '.join(SCHEDULES)}, level1, level2, level3, ring, recompute, or it is {WHOLE}.")
    return Who(name, "mpilm", frozenset(name.split("-")), tuned=False, folder=__name__)


def size(who: Who) -> int:
    """Ranks of a layout."""
    return prod(_axis(axis, who.variants) for axis in AXES)


def configuration(case: Case, words: frozenset[str]) -> Config:
    """The case as `mpilm.train` would be told it: fast mode, bf16, not compiled, because a compiler needs memory too.
    """
    level = next((level for level in (1, 2, 3) if f"level{level}" in words), 0)
    micro_batches = min(MICRO_BATCHES, case.global_batch_size)
    return Config(
        run=Run(reproducible=False, precision="bf16", compile="off", threads=1),
        model=Model(layers=case.layers, width=case.width, heads=case.heads, hidden=case.hidden),
        data=Data(sequence_length=case.sequence_length, global_batch_size=case.global_batch_size,
                  micro_batch_size=case.global_batch_size // micro_batches),
        optim=Optim(lr=3e-4, clip=1.0),
        parallel=Parallel(pp=_axis("pp", words), cp=_axis("cp", words), tp=_axis("tp", words),
                          schedule=next((name for name in SCHEDULES if name in words), "1f1b"),
                          recompute="recompute" in words),
        sync=Sync(kind="sharded" if level else "allreduce", level=level or 1,
                  collective="ring" if "ring" in words else "shared"))


def _axis(axis: str, words: frozenset[str]) -> int:
    return next((int(word.removeprefix(axis)) for word in words if word[:2] == axis), 1)
