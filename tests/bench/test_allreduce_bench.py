"""The benchmark of collectives: figures for all of them under both kinds of malloc, which say nothing about speed."""

import os
import subprocess
import sys

import pytest
from mpi4py import MPI

from mpilm.bench import allreduce
from mpilm.log import UserError

FAULTS = """
import resource
import numpy as np
from mpilm.bench._malloc import keep_what_is_freed

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    np.empty(2 ** 24, np.float32)[::1024] = 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

usual = [faults() for _ in range(3)]
assert keep_what_is_freed()
print(min(usual[1:]), [faults() for _ in range(3)][-1])
"""


@pytest.mark.slow
@pytest.mark.ranks(min=2)
def test_figures_for_all(comm, monkeypatch):
    changed = []
    monkeypatch.setattr(allreduce, "keep_what_is_freed", lambda: changed.append(len(figures)) is None)
    monkeypatch.setattr(allreduce, "SIZES_MIB", (1,))
    monkeypatch.setattr(allreduce, "ROUNDS", 1)
    figures = []
    allreduce.run(comm, lambda *figure: figures.append(figure))
    everyone = {"ring", "shared", "tree", "mpi", "gloo", "copy"}
    assert [case for case, *_ in figures] == ["1MiB"] * 6 + ["1MiB kept"] * 6
    assert {who for _, who, *_ in figures[:6]} == {who for _, who, *_ in figures[6:]} == everyone
    assert all(value > 0 and unit == "GB/s" for _, _, value, unit in figures)
    assert changed == [6], "as people run it comes first, and only then is malloc changed"


@pytest.mark.serial
def test_one_rank_is_told_to_be_two():
    with pytest.raises(UserError, match="mpirun -np 2"):
        allreduce.run(MPI.COMM_SELF, lambda *_: None)


@pytest.mark.serial
@pytest.mark.skipif("glibc" not in (os.confstr("CS_GNU_LIBC_VERSION") or ""), reason="needs glibc")
def test_freed_memory_is_kept():
    """Before, every allocation of 64 MiB is faulted in anew."""
    told = subprocess.run([sys.executable, "-c", FAULTS], env={"GLIBC_TUNABLES": ""}, capture_output=True, text=True,
                          check=True).stdout
    usual, kept = map(int, told.split())
    assert usual > 10 * max(1, kept), told
