"""Benchmarks: ours and what one would pick instead, interleaved in one run.

    mpirun -np 2 python -m mpilm.bench allreduce            # a table with ratios
    mpirun -np 2 python -m mpilm.bench allreduce --json     # an object a line: bench, case, who, value, unit

A menu: `bench/<name>.py` has `run(comm, emit)`, which is collective over `comm` and calls `emit(case, who, value,
unit)` on every rank for each figure (a median over interleaved rounds, see measure.py), and a constant `OURS`: the
names in `who` that are ours, which the table divides by all others. Its own options are declared in `_options.py` and
come as keyword arguments; where it returns text, that is printed instead of the table.
"""
