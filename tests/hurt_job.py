"""`mpilm.train`, in which ranks are killed or slow at chosen places: python -m tests.hurt_job HURTS ARGS...

HURTS is `rank:module:function:call` with commas between; the rank kills itself, with SIGKILL, when it enters the call
of that number, from 1. `+seconds` in its place: every call takes so much longer.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import os
import signal
import sys
import time
from operator import attrgetter

from mpilm import launch, train


def arm(module, name, when):
    """Die in the call of that number of `module.name`, or make all calls slow."""
    *path, last = name.split(".")
    owner = attrgetter(".".join(path))(module) if path else module
    function, calls = getattr(owner, last), itertools.count(1)

    @functools.wraps(function)
    def armed(*args, **options):
        if when.startswith("+"):
            time.sleep(float(when))
        elif next(calls) == int(when):
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **options)
    setattr(owner, last, armed)


def main():
    """Arm as soon as MPI runs, then train."""
    hurts = [hurt.split(":") for hurt in sys.argv[1].split(",")]
    greet, armed = launch.greet, []

    def greet_armed(world, run_dir):
        if not armed:
            for rank, module, name, when in hurts:
                if world.rank == int(rank):
                    arm(importlib.import_module(module), name, when)
            armed.append(True)
        greet(world, run_dir)

    launch.greet = greet_armed
    train.main(sys.argv[2:])


if __name__ == "__main__":
    launch.command(main)
