"""A process of a contender: builds it, then trains as many steps as it is told and waits, using no processor time.

    python -m mpilm.bench._child '{"who": "ddp-tuned", "case": {...}, "cores": [0, 1], "directory": "..."}' RANK SIZE

Between commands it is blocked in reading its own connection to the benchmark (never in an MPI call, which would spin),
so that contenders can wait beside each other and take turns. One JSON object a line, both ways:

    {"rank": 0, "pid": 4711}                           once, when it is ready
    {"steps": 4}  ->  {"seconds": 3.2, "losses": [...]}    the time of this process alone
    end of file                                        it leaves
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any

from mpilm import placement
from mpilm.bench._contenders import Case, Place, Step, Telling, Who

SOCKET = "socket"
RENDEZVOUS = "rendezvous"


def main(argv: Sequence[str]) -> None:
    """Enter the contender and serve until the benchmark hangs up."""
    task = json.loads(argv[0])
    who = Who(**task["who"], variants=frozenset(task["variants"]))
    rank, size = _position(argv[1:])
    cores = share(task["cores"], rank, size)
    os.sched_setaffinity(0, cores)
    place = Place(rank, size, cores, os.path.join(task["directory"], RENDEZVOUS), who.variants)
    with who.load().contender(Case(**task["case"]), place) as step:
        serve(step, rank, os.path.join(task["directory"], SOCKET))
    if rank == 0:  # also when the benchmark was killed
        shutil.rmtree(task["directory"], ignore_errors=True)


def _position(argv: Sequence[str]) -> tuple[int, int]:
    """Rank and size: given, or the launcher's."""
    if argv:
        return int(argv[0]), int(argv[1])
    launcher = placement.launcher(os.environ)
    return (launcher.rank, launcher.size) if launcher else (0, 1)


def share(cores: Sequence[int], rank: int, size: int) -> tuple[int, ...]:
    """The cores of one of `size` processes: all have as many, and at least one."""
    each = max(1, len(cores) // size)
    start = rank * each % len(cores)
    return tuple(cores[start:start + each])


def serve(step: Step, rank: int, path: str) -> None:
    """Obey commands until the other side closes the connection."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("r", encoding="utf-8") as commands:
            _send(connection, {"rank": rank, "pid": os.getpid()})
            for line in commands:
                _send(connection, {"rank": rank} | _run(step, json.loads(line)["steps"]))


def _run(step: Step, steps: int) -> dict[str, Any]:
    start = time.perf_counter()
    losses, told = [], dict[str, float]()
    for _ in range(steps):
        losses.append(step())
        for key, value in step.seconds.items() if isinstance(step, Telling) else ():
            told[key] = told.get(key, 0.0) + value
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "losses": losses, "max_rss_kib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
            "told": told}


def _send(connection: socket.socket, message: dict[str, Any]) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


if __name__ == "__main__":
    main(sys.argv[1:])
