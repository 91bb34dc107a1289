"""Schedules as text."""

from __future__ import annotations

import pytest

from mpilm import plan
from mpilm.log import UserError
from mpilm.parallel import schedules
from tests.helpers import run_nested

pytestmark = pytest.mark.serial


def test_the_drawing_shows_who_does_what_when():
    """One cell a unit of time; a whole backward pass takes two."""
    assert plan.drawing("1f1b", 2, 2).splitlines() == [
        "1f1b: 2 ranks, 2 micro-batches; bubble 33% of the step; activations of 2 micro-batches at most",
        "rank 0| F0-- F1--           B0-------      B1-------",
        "rank 1|      F0-- B0------- F1-- B1-------"]


@pytest.mark.parametrize("name", sorted(schedules.MENU))
def test_every_schedule_can_be_drawn(name):
    """A line for each rank, with every micro-batch in it."""
    head, *lines = plan.drawing(name, 3, 4, 2).splitlines()
    assert head.startswith(f"{name}: 3 ranks") and len(lines) == 3
    assert all(f"F{number}" in line for line in lines for number in range(4))


def test_as_a_command():
    """Quick, without MPI; a mistake is told."""
    result = run_nested(0, ["-m", "mpilm.plan", "--show-schedule"])
    assert result.rc == 0 and all(f"{name}: 4 ranks" in result.stdout for name in schedules.MENU), result.stderr
    result = run_nested(0, ["-m", "mpilm.plan", "--show-schedule", "5f5b"])
    assert result.rc == 2 and "--show-schedule 5f5b" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("option", ["parallel.pp", "parallel.chunks", "micro-batches"])
def test_numbers_that_make_no_sense_are_refused(option):
    """By the name that was typed."""
    with pytest.raises(UserError, match=f"--{option} 0"):
        plan.main(["--show-schedule", "zb", f"--{option}", "0"])
