"""Who takes part in a benchmark of training steps: a menu, the first word of the name is the file.

    "ddp-compile-tuned"  is  ddp.py  with the variants "compile" and "tuned"

A file has `LAYOUT` ("peers": a process a rank, which meet over Gloo; "one": a single process with all threads; "mpi": a
job of its own under mpirun), `VARIANTS` (the words that may follow its name), and

    contender(case, place) -> context manager of step() -> loss

which is entered in a fresh process, pinned to `place.cores`, that has imported neither torch nor mpi4py. Every call of
`step` trains on one global batch of random tokens and returns this rank's loss in nats per token. This is the menu of
`bench train`; `bench pipeline` has its own folder.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, cast

from mpilm.log import UserError

Step = Callable[[], float]
Precision = Literal["bf16", "fp32"]
OURS = "mpilm"
TUNED = "tuned"  # the malloc settings that ours starts under; set by who starts the process, so no file sees it


@dataclass(frozen=True)
class Case:
    """A model's shape and the batch of one step over all ranks, in sequences; `precision`, bf16 or fp32, is everyone's,
    and `compile` ours."""

    name: str
    layers: int
    width: int
    heads: int
    hidden: int
    vocab_size: int
    sequence_length: int
    global_batch_size: int
    precision: Precision = "bf16"
    compile: Literal["on", "off"] = "on"

    @property
    def tokens(self) -> int:
        """Tokens of a step, over all ranks."""
        return self.sequence_length * self.global_batch_size


CASES = {
    case.name: case
    for case in (
        Case("reference", layers=6, width=384, heads=6, hidden=1024, vocab_size=8192, sequence_length=256,
             global_batch_size=16),
        Case("wide", layers=4, width=768, heads=12, hidden=2048, vocab_size=16384, sequence_length=128,
             global_batch_size=8),
        Case("deep", layers=8, width=512, heads=8, hidden=1408, vocab_size=4096, sequence_length=256,
             global_batch_size=16),
        Case("tiny", layers=2, width=32, heads=2, hidden=64, vocab_size=64, sequence_length=16, global_batch_size=4,
             compile="off"),
    )
}
# "deep" is for memory, because most of it is in its blocks; "tiny" shows in a minute that a contender runs.
MEASURED = ("reference", "wide")


@dataclass(frozen=True)
class Place:
    """Where one process of a contender runs.

    Args:
        rank: Its number.
        size: Processes of the contender.
        cores: Logical CPUs that it is pinned to; as many threads.
        rendezvous: A file, still missing, through which Gloo's processes meet.
        variants: Of the contender's name, without "tuned".
    """

    rank: int
    size: int
    cores: tuple[int, ...]
    rendezvous: str
    variants: frozenset[str]


@dataclass
class Telling:
    """A step that also tells where its time went: seconds of its last call, by what for."""

    step: Step
    seconds: dict[str, float] = field(default_factory=dict)

    def __call__(self) -> float:
        return self.step()


class Contender(Protocol):
    """What a file of this folder has."""

    LAYOUT: str
    VARIANTS: tuple[str, ...]

    def contender(self, case: Case, place: Place) -> AbstractContextManager[Step]:
        """Build model and optimizer; leaving the context ends the process group."""


@dataclass(frozen=True)
class Who:
    """A contender's name, taken apart."""

    name: str
    file: str
    variants: frozenset[str]
    tuned: bool
    folder: str = __name__

    @property
    def ours(self) -> bool:
        """Whether it is the product, not a peer."""
        return self.file == OURS

    def load(self) -> Contender:
        """Its module; imports neither torch nor mpi4py."""
        return _load(self.file, self.folder)


def files() -> list[str]:
    """The contenders there are, without variants."""
    found = {module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")}
    return sorted(found, key=lambda file: (file != OURS, file))  # ours first


def names() -> list[str]:
    """All contenders with all their variants; ours, the peers as people run them, then the same tuned."""
    plain = [name for file in files() for name in _plain(file)]
    return plain + [f"{name}-{TUNED}" for name in plain if not parse(name, known=plain).ours]


def _plain(file: str) -> list[str]:
    return [file, *(f"{file}-{variant}" for variant in _load(file).VARIANTS)]


def _load(file: str, folder: str = __name__) -> Contender:
    return cast(Contender, importlib.import_module(f"{folder}.{file}"))


def parse(name: str, *, known: list[str] | None = None, folder: str = __name__) -> Who:
    """Take a name apart; `known` are those of `folder`.

    Raises:
        UserError: There is no contender of that name.
    """
    known = names() if known is None else known
    if name not in known:
        raise UserError(f"--who {name}: there is no such contender; there are {', '.join(known)}.")
    file, *variants = name.split("-")
    return Who(name, file, frozenset(variants) - {TUNED}, TUNED in variants, folder)
