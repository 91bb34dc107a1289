"""Command lines of the benchmarks that take more than --json: a function each, by the benchmark's name.

They are declared here, not beside `run`, because a benchmark's file may start MPI when it is imported, and --help must
not. What they parse becomes keyword arguments of `run`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpilm.bench import _contenders, _layouts, _pipelines, _replicas, _servers, _shardings, _tensors


def train(parser: argparse.ArgumentParser) -> None:
    """Of `bench/train.py`."""
    names = _contenders.names()
    _contest(parser, names, names, "contenders; ratios are to ddp, else to the first peer,")
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                        help="of all contenders; auto: the faster one here (default: %(default)s)")


def sharded(parser: argparse.ArgumentParser) -> None:
    """Of `bench/sharded.py`."""
    _contest(parser, _shardings.names(), _shardings.MEASURED, "contenders")


def server(parser: argparse.ArgumentParser) -> None:
    """Of `bench/server.py`."""
    _contest(parser, _servers.names(), _servers.MEASURED, "contenders")
    parser.add_argument("--mib", type=_positive, default=64,
                        help="size of the gradients that a server is timed with (default: %(default)s)")
    parser.add_argument("--sleep_ms", type=_positive, default=20,
                        help="what a step takes a worker that sleeps instead of computing (default: %(default)s)")


def compress(parser: argparse.ArgumentParser) -> None:
    """Of `bench/compress.py`."""
    parser.add_argument("--mib", type=_positive, default=64, help="size of the gradient (default: %(default)s)")


def quality(parser: argparse.ArgumentParser) -> None:
    """Of `bench/quality.py`."""
    _runs(parser, _replicas.names())
    parser.add_argument("--steps", type=_positive, default=256, help="of each run (default: %(default)s)")


def gpu(parser: argparse.ArgumentParser) -> None:
    """Of `bench/gpu.py`."""
    parser.add_argument("--part", choices=("links", "steps"), default="links",
                        help="collectives, or training steps (default: %(default)s)")
    parser.add_argument("--case", default="124m,350m,1300m", metavar="CASE,...", help="models (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of every contender (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=5, help="timed steps of a turn (default: %(default)s)")
    parser.add_argument("--reproducible", action="store_true", help="also measure reproducible mode")
    parser.add_argument("--fp8", action="store_true", help="also measure linear layers in fp8")
    parser.add_argument("--graphs", action="store_true", help="also measure blocks that are launched as CUDA graphs")
    parser.add_argument("--peer", action="store_true", help="also measure transformers' Llama under torch.compile")
    parser.add_argument("--nanogpt", default="", metavar="FOLDER", help="also measure nanoGPT, of a checkout that is "
                        "there, under torch.compile")


def slow(parser: argparse.ArgumentParser) -> None:
    """Of `bench/slow.py`."""
    _runs(parser, _replicas.SLOW)
    parser.add_argument("--steps", type=_positive, default=160, help="of each run (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=3, help="turns of every run (default: %(default)s)")
    parser.add_argument("--mbit_s", type=_positive, default=100, help="of the network (default: %(default)s)")
    parser.add_argument("--latency_ms", type=_positive, default=1, help="of the network (default: %(default)s)")


def _runs(parser: argparse.ArgumentParser, measured: Sequence[str]) -> None:
    """The options of the benchmarks of ways to keep replicas together."""
    parser.add_argument("--who", default=",".join(measured), metavar="NAME,...",
                        help=f"which of {', '.join(_replicas.names())} (default: %(default)s)")


def pipeline(parser: argparse.ArgumentParser) -> None:
    """Of `bench/pipeline.py`."""
    _contest(parser, _pipelines.names(), _pipelines.MEASURED, "contenders")
    parser.add_argument("--emulated", type=int, default=4, metavar="STAGES",
                        help="also play schedules on so many stages whose passes sleep; 0: none (default: %(default)s)")


def tensor(parser: argparse.ArgumentParser) -> None:
    """Of `bench/tensor.py`."""
    _contest(parser, _tensors.names(), _tensors.MEASURED, "contenders")


def memory(parser: argparse.ArgumentParser) -> None:
    """Of `bench/memory.py`."""
    parser.add_argument("--case", default="deep", metavar="CASE,...",
                        help=f"which models of {', '.join(_contenders.CASES)} (default: %(default)s)")
    parser.add_argument("--who", default=",".join(_layouts.MEASURED), metavar="LAYOUT,...",
                        help="which layouts, such as pp2-tp2-zb or dp4-level3-ring (default: %(default)s)")


def _contest(parser: argparse.ArgumentParser, names: Sequence[str], measured: Sequence[str], noun: str) -> None:
    """The options of every benchmark in which contenders take turns."""
    parser.add_argument("--case", default=",".join(_contenders.MEASURED), metavar="CASE,...",
                        help=f"which models of {', '.join(_contenders.CASES)} (default: %(default)s)")
    parser.add_argument("--who", default=",".join(measured), metavar="NAME,...",
                        help=f"which {noun} of {', '.join(names)} (default: %(default)s)")
    parser.add_argument("--rounds", type=_positive, default=5, help="turns of every contender (default: %(default)s)")
    parser.add_argument("--steps", type=_positive, default=4, help="timed steps of a turn (default: %(default)s)")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}: a number above 0 is wanted")
    return int(text)


OPTIONS = {"train": train, "pipeline": pipeline, "sharded": sharded, "tensor": tensor, "memory": memory,
           "server": server, "compress": compress, "quality": quality, "slow": slow, "gpu": gpu}
DEVICES = {"gpu": "cuda"}   # of the session; the others measure CPUs
STOCK_MALLOC = {"allreduce"}    # starts as any process does, and changes it later
