"""A rank that hangs is named; who lags, as far as that is arithmetic."""

from __future__ import annotations

import re
import signal
import threading
import time
from datetime import UTC, datetime, timedelta

import pytest
from mpi4py import MPI

from mpilm import heartbeat
from mpilm.vigil import Beat, Vigil
from tests import datasets
from tests.chaos.jobs import Job

pytestmark = pytest.mark.serial
TIMEOUT_S = 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.mark.parametrize(("ranks", "victims", "options"), [
    (3, [0, 1], {"sync.kind": "parameter_server"}), (3, [1, 2], {"run.spares": 1})],
    ids=["a server and a worker, all but the last", "a replica and a spare"])
def test_a_rank_that_stopped_is_named(data, tmp_path, ranks, victims, options):
    options |= {"run.steps": 100000, "run.hang_timeout_s": TIMEOUT_S, "log.validate_every": 0}
    with Job(ranks, data, tmp_path / "run", **options) as job:
        assert job.until_step(5), job.words.read_text()
        for victim in victims:      # the second is waited for when the first is missed already
            assert job.signal(victim, signal.SIGSTOP)
            time.sleep(3 * TIMEOUT_S / heartbeat.BEATS)
        begun = time.monotonic()
        code = job.wait()
        took = time.monotonic() - begun
    said = job.words.read_text()
    when, _, left = (tmp_path / "run" / heartbeat.FILE).read_text().partition("\n")
    assert datetime.now(tz=UTC) - datetime.strptime(when, "%Y-%m-%d %H:%M:%S %z") < timedelta(minutes=2)
    assert code == heartbeat.HUNG, said
    assert f"rank {', '.join(map(str, victims))} does not answer" in said, said
    assert without_steps(left).strip() in without_steps(said), said
    for other in set(range(ranks)) - set(victims):
        assert f"rank {other}: step " in left
        assert f"rank {other} on " in left
    assert "thread MainThread" in left
    waits = ("p2p.py", "Barrier()", "Allgather")     # between sums, or for all before an update and after it
    assert any(place in left for place in waits), "nobody waits for the one that stopped"
    assert took < TIMEOUT_S + heartbeat.ANSWER_S + 10, "it took long, even for a busy machine"


def without_steps(text):
    """Lines of metrics may come in the middle of anything else, where others still train."""
    return re.sub(r"step +\d.*\n", "", text)


@pytest.mark.parametrize(("place", "doing"), [("assemble:build", "assembling"),
                                              ("train:summarize", "telling how it ended")])
def test_before_and_after_training_it_hangs_as_well(data, tmp_path, place, doing):
    options = {"run.steps": 2, "run.hang_timeout_s": 1, "log.validate_every": 0}
    with Job(2, data, tmp_path / "run", program=["tests.hurt_job", f"1:mpilm.{place}:+60"], **options) as job:
        code = job.wait()
    said = job.words.read_text()
    assert code == heartbeat.HUNG, said
    assert "every rank answers" in said
    assert f", {doing}, for " in said


@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="needs ULFM: Open MPI")
@pytest.mark.parametrize("after", [False, True], ids=["while the others meet", "when they have gone on"])
def test_a_rank_that_stopped_after_a_death_is_noticed(data, tmp_path, after):
    options = {"run.steps": 100000, "run.hang_timeout_s": TIMEOUT_S, "log.validate_every": 0}
    with Job(3, data, tmp_path / "run", ulfm=True, **options) as job:
        assert job.until_step(5), job.words.read_text()
        if after:
            assert job.kill(2)
            assert job.until(lambda: "went on after" in job.words.read_text())
            assert job.signal(1, signal.SIGSTOP)
        else:
            assert job.signal(1, signal.SIGSTOP)
            assert job.kill(2)
        code = job.wait()
    said = job.words.read_text()
    assert code == heartbeat.HUNG, said
    assert ("rank 1 does not answer" if after else "those who are left have not met") in said


def test_a_last_save_that_takes_long_is_no_hang(data, tmp_path):
    slowed = ",".join(f"{rank}:mpilm.checkpoint.tensorfile:os.write:+0.5" for rank in (0, 1))
    options = {"run.steps": 3, "run.hang_timeout_s": 2, "log.validate_every": 0, "model.width": 256}
    with Job(2, data, tmp_path / "run", program=["tests.hurt_job", slowed], **options) as job:
        code = job.wait()
    assert code == 0, job.words.read_text()
    assert "finished at step 3" in job.words.read_text()


def beat(step, compute_s=0.1, part=0, doing="computing"):
    """A sign of life."""
    return Beat(step, step * 4, doing, 0.05, part, compute_s)


class Clock:
    """Goes when told."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def vigil():
    """Over four ranks, and its clock."""
    clock = Clock()
    return Vigil(4, timeout_s=10, slow=1.5, clock=clock), clock


def test_a_slow_rank_is_named_once_and_again_when_it_was_quick_in_between(vigil):
    watch, _ = vigil
    for step, wanted in enumerate([0, 0, 1, 0, 0]):
        for rank in range(4):
            watch.hear(rank, beat(step, compute_s=0.3 if rank == 2 else 0.1))
        assert len(named := watch.stragglers()) == wanted
        if wanted:
            assert "rank 2 is a straggler" in named[0]
            assert "3.0 times the median" in named[0]
    watch.hear(2, beat(6))
    assert not watch.lagging
    for step in range(7, 11):
        watch.hear(2, beat(step, compute_s=0.3))
    assert len(watch.stragglers()) == 1


def test_ranks_with_other_work_are_not_compared(vigil):
    watch, _ = vigil
    for step in range(6):
        for rank in range(4):
            watch.hear(rank, beat(step, compute_s=0.1 * (1 + rank % 2), part=rank % 2))
    assert not watch.stragglers()


def test_beats_of_one_step_count_once(vigil):
    watch, _ = vigil
    for rank in (0, 1, 3):
        watch.hear(rank, beat(1))
    for _ in range(10):
        watch.hear(2, beat(1, compute_s=1.0))
    assert not watch.stragglers()


def test_silence(vigil):
    watch, clock = vigil
    for clock.now in range(1, 9):
        for rank in (0, 1, 3):
            watch.hear(rank, beat(int(clock.now)))
    assert watch.missing() == []
    clock.now = 8.5
    assert watch.missing() == [2]
    assert watch.hangs()
    assert "rank 2 does not answer" in watch.report({0: "stack"}, watch.missing())


def test_only_the_silence_of_those_it_watches_counts():
    clock = Clock()
    watch = Vigil(4, timeout_s=10, slow=1.5, watched=[1], clock=clock)
    clock.now = 9
    watch.hear(1, beat(1))
    assert watch.missing() == []
    clock.now = 18
    assert watch.silence(1) == 9
    assert watch.missing() == [1]
    assert "rank 0, 1 does not answer" in watch.report({}, [0, 1])


def test_a_spare_that_waits_is_neither_progress_nor_a_lack_of_it(vigil):
    watch, clock = vigil
    for clock.now in range(30):
        for rank in range(4):
            watch.hear(rank, beat(0, doing="waiting") if rank == 3 else beat(int(min(clock.now, 15))))
        assert watch.hangs() == (clock.now > 25)


def test_all_beat_and_nobody_gets_further(vigil):
    watch, clock = vigil
    for clock.now in range(12):
        for rank in range(4):
            watch.hear(rank, beat(3, doing="summing"))
    assert watch.missing() == []
    assert watch.hangs()
    assert "every rank answers" in watch.report({}, watch.missing())
    assert "rank 3: step 3, summing" in watch.report({}, watch.missing())


def test_what_happens_once_may_take_longer(vigil):
    watch, clock = vigil
    for clock.now in range(60):
        for rank in range(4):
            watch.hear(rank, beat(0, doing="assembling")._replace(patience=5 if rank == 1 else 1))
        assert watch.hangs() == (clock.now > 50)


def test_what_a_long_step_is_doing_is_progress(vigil):
    watch, clock = vigil
    for clock.now in range(30):
        for rank in range(4):
            watch.hear(rank, Beat(3, int(clock.now), "forward and backward", 1.0, 0, 0.1))
    assert not watch.hangs()


def test_a_beat_survives_the_message():
    assert Beat.from_text(beat(7).to_text()) == beat(7)


def test_whoever_was_stopped_itself_has_nothing_to_say_about_others(vigil):
    watch, clock = vigil
    clock.now = 20
    assert watch.hangs()
    watch.restart()
    assert not watch.hangs()


@pytest.mark.parametrize("doing", ["_beat", "_listen"])
def test_wherever_it_was_stopped(comm, tmp_path, monkeypatch, doing):
    going_on, told, turns = getattr(heartbeat.Heart, doing), [], []
    through = threading.Event()

    def stopped(heart):
        turns.append(doing)
        if len(turns) == 3:
            time.sleep(1.2)
        if len(turns) == 5:
            through.set()
        going_on(heart)

    monkeypatch.setattr(heartbeat.Heart, doing, stopped)
    monkeypatch.setattr(heartbeat.Heart, "_tell", lambda heart, report: told.append(report))
    where = heartbeat.Where()
    where.enter("computing")
    heart = heartbeat.Heart(comm, where, timeout_s=1, slow=1.5, directory=tmp_path)
    assert through.wait(60)
    heart.close()
    assert not told
