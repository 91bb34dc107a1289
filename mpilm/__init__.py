"""mpilm: train language models under MPI.

    mpirun -np 8 python -m mpilm.train
"""

__version__ = "0.1.0"
