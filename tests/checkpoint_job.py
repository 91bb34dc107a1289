"""A job that does nothing but save, for test_checkpoint_kill.py: mpirun -np N python -m tests.checkpoint_job DIRECTORY

Every element of the state is the step. `progress` has the last step that `save` returned for, `pid-*` whom to kill.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpilm.checkpoint import Piece, Writer, newest

EVERY = 2
SIZE = 1 << 20


def main() -> None:
    """Go on from the newest checkpoint, for ever."""
    directory, comm = Path(sys.argv[1]), MPI.COMM_WORLD
    (directory / f"pid-{comm.rank}").write_text(str(os.getpid()))
    reader = newest(directory / "checkpoints", comm)
    step = reader.step if reader else 0
    writer = Writer(directory / "checkpoints", comm, keep_last=1, file_bytes=SIZE)
    values = np.full(SIZE, step, np.float32)
    progress = os.open(directory / "progress", os.O_WRONLY | os.O_CREAT)
    while True:
        step += 1
        values[:] = step
        writer.poll()
        if step % EVERY == 0:
            writer.save(step, [Piece("model.w", (comm.size * SIZE,), comm.rank * SIZE, values)], {})
            if comm.rank == 0:
                os.pwrite(progress, b"%-9d" % step, 0)


if __name__ == "__main__":
    main()
