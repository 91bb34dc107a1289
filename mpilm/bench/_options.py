"""Command lines of the benchmarks that take more than --json: a function each, by the benchmark's name.

They are declared here, not beside `run`, because a benchmark's file may start MPI when it is imported, and --help must
not. What they parse becomes keyword arguments of `run`.
"""

from __future__ import annotations

import argparse

from mpilm.bench import _contenders, _shardings


def train(parser: argparse.ArgumentParser) -> None:
    """Of `bench/train.py`."""
    cases, names = ",".join(_contenders.MEASURED), ",".join(_contenders.names())
    parser.add_argument("--case", default=cases, metavar="CASE,...",
                        help=f"which models of {', '.join(_contenders.CASES)} (default: %(default)s)")
    parser.add_argument("--who", default=names, metavar="NAME,...",
                        help="which contenders; ratios are to ddp, else to the first peer (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of every contender (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=4, help="timed steps of a turn (default: %(default)s)")


def sharded(parser: argparse.ArgumentParser) -> None:
    """Of `bench/sharded.py`."""
    parser.add_argument("--case", default=",".join(_contenders.MEASURED), metavar="CASE,...",
                        help=f"which models of {', '.join(_contenders.CASES)} (default: %(default)s)")
    parser.add_argument("--who", default=",".join(_shardings.MEASURED), metavar="NAME,...",
                        help=f"which of {', '.join(_shardings.names())} (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of every contender (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=4, help="timed steps of a turn (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is wanted")
    return int(text)


OPTIONS = {"train": train, "sharded": sharded}
