"""mpilm: train language models under MPI.

    mpirun -np 8 python -m mpilm.train
"""

import sys
from pathlib import Path

__version__ = "0.1.0"

# `python mpilm/train.py` looks for modules here first, where inspect.py and others hide Python's own.
if sys.path and Path(sys.path[0]).resolve() == Path(__file__).resolve().parent:
    del sys.path[0]
