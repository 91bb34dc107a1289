"""What stays, what goes, and what a kill may leave behind."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mpilm.checkpoint import Writer, differences, newest
from mpilm.checkpoint.retention import Kept, complete, expired
from tests.checkpoint_cases import assert_holds, cut, tensors, write


def names(directory, comm):
    comm.Barrier()
    found = sorted(path.name for path in directory.iterdir())
    comm.Barrier()
    return found


@given(st.sets(st.integers(0, 50)), st.integers(1, 5), st.integers(0, 7), st.integers(-1, 50))
def test_the_newest_the_multiples_and_the_one_that_was_named_stay(steps, keep_last, keep_every, spared):
    gone = expired(steps, Kept(keep_last, keep_every, spared))
    assert spared not in gone
    stay = steps - set(gone)
    assert set(sorted(steps)[-keep_last:]) <= stay
    assert all(step in stay for step in steps if keep_every and step % keep_every == 0)
    others = sorted(step for step in stay if not (keep_every and step % keep_every == 0))
    assert len(set(others) - {spared}) <= keep_last


def test_older_checkpoints_go(comm, tmp_path_all):
    write(tmp_path_all / "c", comm, [10, 20, 30, 40, 50], keep_last=2, keep_every=20)
    assert names(tmp_path_all / "c", comm) == ["step-00000020", "step-00000040", "step-00000050"]


def test_a_step_that_is_saved_again_is_replaced(comm, tmp_path_all):
    write(tmp_path_all / "c", comm, [1, 2])
    writer = Writer(tmp_path_all / "c", comm, keep_last=2)
    writer.save(2, cut(tensors(99), comm.rank, comm.size, 5), {})
    writer.wait()
    assert names(tmp_path_all / "c", comm) == ["step-00000001", "step-00000002"]
    assert_holds(newest(tmp_path_all / "c", comm), tensors(99))


def test_steps_from_before_the_run_went_back_are_set_aside(comm, tmp_path_all, capfd):
    write(tmp_path_all / "c", comm, [1, 2, 3, 4])
    write(tmp_path_all / "c", comm, [2], keep_last=2)
    expected = ["step-00000001", "step-00000002", "step-00000003.abandoned", "step-00000004.abandoned"]
    assert names(tmp_path_all / "c", comm) == expected
    assert newest(tmp_path_all / "c", comm).step == 2
    if comm.rank == 0:
        assert "step-00000004.abandoned" in capfd.readouterr().err


def test_what_killed_jobs_left_is_removed(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2, 3])
    if comm.rank == 0:
        for left in (".step-00000004.partial", ".step-00000001.removed", ".step-00000002.replaced"):
            (directory / left).mkdir()
            (directory / left / "rank-00000-part-00.safetensors").write_bytes(b"half a file")
        (directory / "notes.txt").write_text("somebody's own")
    comm.Barrier()
    Writer(directory, comm)
    assert names(directory, comm) == ["notes.txt", "step-00000001", "step-00000002", "step-00000003"]


def test_a_kill_between_the_two_renames_loses_nothing(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1, 2])
    if comm.rank == 0:
        (directory / "step-00000002").rename(directory / ".step-00000002.replaced")
    comm.Barrier()
    reader = newest(directory, comm)
    writer = Writer(directory, comm, keep_last=1)
    assert reader.step == 2
    assert_holds(reader, tensors(2))
    comm.Barrier()
    writer.save(2, cut(tensors(3), comm.rank, comm.size), {})
    writer.wait()
    assert names(directory, comm) == ["step-00000002"]
    assert_holds(newest(directory, comm), tensors(3))


def test_looking_changes_nothing(comm, tmp_path_all):
    directory = tmp_path_all / "c"
    write(directory, comm, [1])
    if comm.rank == 0:
        (directory / ".step-00000002.partial").mkdir()
    before = names(directory, comm)
    newest(directory, comm)
    assert names(directory, comm) == before
    assert newest(tmp_path_all / "nowhere", comm) is None
    assert complete(tmp_path_all / "nowhere") == {}


def test_differences_name_keys():
    expected = {"model": {"layers": 6, "heads": (1, 2)}, "seed": 1, "x": 1}
    found = {"model": {"layers": 4, "heads": [1, 2]}, "seed": 1, "y": {}}
    assert differences(expected, found) == [
        "model.layers: expected 6, found 4", "x: expected 1, found nothing", "y: expected nothing, found {}"]
