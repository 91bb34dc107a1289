"""A process that sends a message of a device's memory to itself, and may die of it: python -m mpilm.comm._probe cuda:0.

Ends with 0 if what arrived is what was sent. See aware.py.
"""

from __future__ import annotations

import sys


def main() -> None:
    """Try."""
    import mpi4py

    mpi4py.rc.initialize = mpi4py.rc.finalize = False
    from mpilm import startup
    from mpilm.comm import devices

    kind, _, index = sys.argv[1].partition(":")
    device = devices.HOST if kind == "cpu" else devices.get(kind)(int(index))   # before MPI starts
    startup.start_mpi(None)
    from mpi4py import MPI

    from mpilm.comm import aware

    problem = aware._tried(device, MPI.COMM_SELF)
    MPI.Finalize()
    if problem:
        raise SystemExit(problem)


if __name__ == "__main__":
    main()
