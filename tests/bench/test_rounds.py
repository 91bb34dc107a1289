"""What rounds say: medians, ratios of the same rounds, the table; who waits, sleeps; memory seen from outside."""

import math
import os

import numpy as np
import pytest

from mpilm.bench import _memory
from mpilm.bench._contenders import CASES
from mpilm.bench._contest import on_root_quietly, shared_cores
from mpilm.bench._rounds import Plan, Results, reference
from mpilm.bench.train import table
from mpilm.failure import RankError
from mpilm.log import UserError

MIB = 2**20


@pytest.fixture
def results():
    """Two groups; the machine was half as fast in the second."""
    rounds = [{"mpilm": 200.0, "ddp": 100.0, "single": 150.0}] * 3 + [{"mpilm": 100.0, "ddp": 50.0, "fsdp2": 40.0}] * 2
    names = ("mpilm", "ddp", "single", "fsdp2")
    return Results(rounds, dict.fromkeys(names, 3 * MIB), dict.fromkeys(names, 4 * MIB), num_groups=2)


def test_ratios_are_of_the_same_rounds(results):
    assert results.median("mpilm") == 200
    assert results.ratio("mpilm", "ddp", by="ddp") == 2
    assert results.ratio("fsdp2", "ddp", by="ddp") == 0.8
    assert results.ratios("single", "fsdp2") == []


def test_who_never_met_is_compared_by_way_of_the_anchor(results):
    assert results.ratio("fsdp2", "single", by="ddp") == pytest.approx(0.8 / 1.5)
    assert math.isnan(results.ratio("fsdp2", "nobody", by="ddp"))


def test_the_reference_is_ddp_else_the_first_peer():
    assert reference(["mpilm", "single", "ddp"]) == "ddp"
    assert reference(["mpilm", "mpilm-reproducible", "single", "fsdp2"]) == "single"
    assert reference(["mpilm"]) == "mpilm"


def test_the_table_names_the_best_peer(results):
    text = table(CASES["wide"], results, Plan(rounds=5, steps=4), size=2, threads=1)
    assert "best peer: single" in text
    row = next(line.split() for line in text.splitlines() if line.startswith("mpilm"))
    assert row == ["mpilm", "200", "2.00", "2.00", "-", "2.00", "1.33", "3", "4"]


def test_the_table_of_nobody():
    assert "nobody" in table(CASES["wide"], Results(), Plan(rounds=1, steps=1), size=1, threads=1)


def test_the_result_of_rank_0_goes_to_all(comm):
    assert on_root_quietly(comm, lambda: f"from {comm.rank}") == "from 0"


def test_the_error_of_rank_0_is_that_of_all(comm):
    def fail():
        raise UserError("no such case")

    def break_():
        raise ZeroDivisionError("a bug")

    with pytest.raises(UserError, match="no such case"):
        on_root_quietly(comm, fail)
    with pytest.raises(ZeroDivisionError if comm.rank == 0 else RankError, match="a bug"):
        on_root_quietly(comm, break_)


def test_the_cores_of_all_ranks_together(comm):
    assert set(shared_cores(comm)) <= set(range(os.cpu_count() or 1))


@pytest.mark.serial
def test_peak_memory_is_seen_though_it_is_gone_later():
    with _memory.peak([os.getpid()]) as peaks:
        before = _memory.pss(os.getpid())
        for _ in range(20):
            np.ones(64 * MIB, np.uint8).sum()
    assert peaks[0] > before + 32 * MIB
    assert _memory.available() > 0
