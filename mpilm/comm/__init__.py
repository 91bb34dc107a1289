"""Ranks and arrays: who sits where, and how arrays move and are summed. numpy and mpi4py only, no torch."""
