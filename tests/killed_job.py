"""`mpilm.train`, in which ranks are killed at moments that are written down: python -m tests.killed_job KILLS ARGS...

KILLS is `rank:module:function:call` with commas between; the rank kills itself, with SIGKILL, when it enters the call
of that number, from 1.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
from operator import attrgetter

from mpilm import launch, train


def arm(module, name, call):
    """Die in the call of that number of `module.name`."""
    *path, last = name.split(".")
    owner = attrgetter(".".join(path))(module) if path else module
    function, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(function)
    def armed(*args, **options):
        if next(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    setattr(owner, last, armed)


def main():
    """Arm as soon as MPI runs, then train."""
    kills = [kill.split(":") for kill in sys.argv[1].split(",")]
    greet, armed = launch.greet, []

    def greet_armed(world, run_dir):
        if not armed:
            for rank, module, name, call in kills:
                if world.rank == int(rank):
                    arm(importlib.import_module(module), name, int(call))
            armed.append(True)
        greet(world, run_dir)

    launch.greet = greet_armed
    train.main(sys.argv[2:])


if __name__ == "__main__":
    launch.command(main)
