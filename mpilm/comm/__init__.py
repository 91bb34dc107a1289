"""Ranks and arrays: who sits where, and how arrays move and are summed. numpy, mpi4py and, on GPUs, cupy; no torch."""
