"""Run a benchmark: mpirun -np 2 python -m mpilm.bench NAME [--json]."""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from types import ModuleType

from mpilm import bench, startup
from mpilm.bench._options import DEVICES, OPTIONS, STOCK_MALLOC
from mpilm.bench.table import Table
from mpilm.launch import command, session
from mpilm.log import UserError, say

NOT_BENCHES = {"__main__", "measure", "table"}


def names() -> list[str]:
    """The benchmarks there are: the files of this folder."""
    files = {module.name for module in pkgutil.iter_modules(bench.__path__)}
    return sorted(name for name in files - NOT_BENCHES if not name.startswith("_"))


def get(name: str) -> ModuleType:
    """The module of a benchmark.

    Raises:
        UserError: There is none of that name.
    """
    if name not in names():
        raise UserError(f"There is no benchmark {name!r}; there are {', '.join(names())}.")
    return importlib.import_module(f"mpilm.bench.{name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m mpilm.bench", description=__doc__)
    benches = parser.add_subparsers(dest="name", required=True, metavar="|".join(names()))
    for name in names():
        bench_parser = benches.add_parser(name)
        bench_parser.add_argument("--json", action="store_true", help="an object a line instead of a table")
        OPTIONS.get(name, lambda _: None)(bench_parser)
    return parser


def main() -> None:
    """Parse the command line, run one benchmark on all ranks, print on rank 0."""
    own = vars(_parser().parse_args())
    name, as_json = own.pop("name"), own.pop("json")
    if name not in STOCK_MALLOC:
        startup.tune_malloc()
    with session(device=DEVICES.get(name, "host")) as world:
        with startup.loading():
            module = get(name)
        if name in DEVICES:
            own["device"] = world.device
        table = Table(name, ours=module.OURS)

        def emit(case: str, who: str, value: float, unit: str) -> None:
            table.add(case, who, value, unit)
            if as_json:
                line = {"bench": name, "case": case, "who": who, "value": round(value, 4), "unit": unit}
                say(json.dumps(line))

        text = module.run(world.comm, emit, **own)
        if not as_json:
            say(text or table.text())


if __name__ == "__main__":
    command(main, tune=False)
