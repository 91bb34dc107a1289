"""How often a run is saved."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest

from mpilm import options
from mpilm.checkpoint import Alone, Saved
from mpilm.config import Checkpoint
from mpilm.interval import FIRST, Interval, optimal
from mpilm.log import UserError
from tests import datasets, small_jobs

serial = pytest.mark.serial


def lost(interval_s, save_s, mtbf_s):
    """The share of the time that is lost when failures come at random: simulated, not by the formula."""
    draw, useful, total = random.Random(1), 0.0, 0.0
    for _ in range(4000):
        until = draw.expovariate(1 / mtbf_s)
        useful += until // (interval_s + save_s) * interval_s
        total += until
    return 1 - useful / total


@serial
@pytest.mark.parametrize(("save_s", "mtbf_s"), [(1, 1000), (10, 1000), (60, 3600)])
def test_less_is_lost_than_with_other_intervals(save_s, mtbf_s):
    best = optimal(save_s, mtbf_s)
    for factor in (0.25, 0.5, 2, 4):
        assert lost(best, save_s, mtbf_s) < lost(best * factor, save_s, mtbf_s)


@serial
def test_young_where_saving_is_cheap_and_never_more_than_the_time_between_failures():
    assert optimal(0.001, 86400) == pytest.approx(math.sqrt(2 * 0.001 * 86400), rel=1e-3)
    assert optimal(100, 10) == 10


@serial
def test_a_number_of_steps():
    interval = Interval(Checkpoint(every=5), 7)
    assert [step for step in range(1, 21) if interval.due(step)] == [5, 10, 15, 20]
    assert not any(Interval(Checkpoint(every=0), 0).due(step) for step in range(100))


@serial
def test_auto_learns_from_its_first_save():
    interval = Interval(Checkpoint(every="auto", mtbf_h=1), 0)
    assert [step for step in range(FIRST + 1) if interval.due(step)] == [FIRST]
    interval.began -= 20.0      # two seconds a step
    interval.saved(FIRST)
    assert not interval.due(FIRST + 1000), "the first one is not written yet"
    interval.learn(Saved(FIRST, Path("x"), 1, stall_s=0.5, write_s=1.0), Alone())
    wanted = FIRST + math.ceil(optimal(0.5, 3600) / interval.step_s)
    assert (interval.due(wanted - 1), interval.due(wanted)) == (False, True)


@serial
def test_no_sooner_than_it_is_written():
    interval = Interval(Checkpoint(every="auto", mtbf_h=1e-4), 0)
    interval.began -= 10.0
    interval.saved(FIRST)
    interval.learn(Saved(FIRST, Path("x"), 1, stall_s=0.01, write_s=60.0), Alone())
    assert interval.next == pytest.approx(FIRST + 60, abs=2)


@pytest.mark.ranks(min=2, max=2)
def test_a_run_that_decides_for_itself(comm, tmp_path_all, capsys):
    """All ranks at the same steps, by the clock of the first."""
    directory = tmp_path_all / "run"
    options = {"checkpoint.every": "auto", "checkpoint.mtbf_h": 1e-6, "checkpoint.keep_last": 10, "run.steps": 40}
    small_jobs.train_here(datasets.for_all(comm, tmp_path_all / "data"), directory, **options)
    saved = sorted(int(path.name.removeprefix("step-")) for path in (directory / "checkpoints").iterdir())
    assert saved[0] == FIRST
    assert len(saved) > 2
    assert saved[-1] == 40
    assert comm.rank or "saving every" in capsys.readouterr().out


@serial
def test_workers_with_old_parameters_must_know_where_they_meet():
    with pytest.raises(UserError, match=r"--checkpoint\.every auto"):
        options.parse(["--checkpoint.every", "auto", "--sync.kind", "parameter_server", "--sync.staleness", "2",
                       "--run.reproducible", "false"])
