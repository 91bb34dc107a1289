"""Programs under a real mpirun: how they start, how any failure on any rank ends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mpilm import placement
from mpilm.launch import session
from mpilm.log import UserError, say
from tests.helpers import Result, run_nested, start

serial = pytest.mark.serial

PROGRAM = """
import os, signal, sys, threading, time
from mpilm.launch import agree, command, on_root, session
from mpilm import failure, placement
from mpilm.log import HostError, UserError, say, warn

mode, directory = sys.argv[1:]
if mode in ("no GPU", "mistake", "interrupt"):
    failure.GRACE_S = 0.5    # the others never come

def loader():
    raise ValueError("the loader broke")

def main():
    if mode == "before":
        raise UserError("--model.width 7: give an even number.")
    if mode == "no file":
        raise HostError("--config x: there is no such file.")
    if mode == "no GPU" and placement.launcher(os.environ).rank == 1:
        raise HostError("GPU 1 cannot be used")
    with session(run_dir=directory) as world:
        last = world.rank == world.size - 1
        if mode == "well":
            own = world.dup("mine")
            say(f"sum {own.allreduce(world.rank + 1)} threads {os.environ['OMP_NUM_THREADS']} {world.threads}")
            warn("careful")
        if mode == "mistake everywhere":
            raise UserError("--data.path x: there is no such folder.")
        if mode == "mistake" and last:
            raise UserError("only I see it")
        if mode == "bug" and last:
            raise ValueError("a bug")
        if mode == "bug on root":
            on_root(world.comm, lambda: 1 // 0)
        if mode == "disk" and last:
            agree(world.comm, OSError(28, "No space left on device"))
        if mode == "disk":
            agree(world.comm, None)
        if mode == "exit" and last:
            sys.exit(7)
        if mode == "exit 256" and last:
            sys.exit(256)
        if mode == "exit well":
            sys.exit(0)
        if mode == "exit well alone" and last:
            failure.PATIENCE_S = 0.2
            sys.exit(0)
        if mode == "exit well alone":
            time.sleep(2.5)
            return
        if mode == "exit of a thread" and last:
            threading.Thread(target=sys.exit, args=(5,), name="loader").start()
        if mode == "thread" and last:
            threading.Thread(target=loader, name="loader").start()
        if mode == "interrupt" and last:
            os.kill(os.getpid(), signal.SIGINT)
        if mode == "interrupt everywhere":
            os.kill(os.getpid(), signal.SIGINT)
        if mode == "crash" and last:
            os.kill(os.getpid(), signal.SIGSEGV)
        if mode == "slow":
            say("ready")
        if mode in ("thread", "slow", "exit of a thread"):
            time.sleep(600)
        world.comm.Barrier()
        say("all through")

command(main)
"""


@pytest.fixture
def program(tmp_path):
    """Runs PROGRAM in one of its modes."""
    file = tmp_path / "program.py"
    file.write_text(PROGRAM)

    def run(mode: str, *, n: int = 2, **options) -> Result:
        return run_nested(n, [str(file), mode, str(tmp_path / "run")], timeout=60, **options)

    run.run_dir, run.file = tmp_path / "run", file
    return run


@serial
@pytest.mark.parametrize("n", [0, 2, 8])
def test_all_well(program, n):
    result = program("well", n=n)
    size = max(n, 1)
    assert result.rc == 0, result
    lines = result.stdout.splitlines()
    assert lines[0].split() == ["rank", "host", "device", "cores", "threads", "memory"]
    assert [line.split()[0] for line in lines[1:size + 1]] == [str(rank) for rank in range(size)]
    threads = max(1, len(placement.cores()) // size)
    assert lines[size + 1:] == [f"sum {size * (size + 1) // 2} threads {threads} {threads}", "all through"]
    assert "warning: careful" in result.stderr
    assert "all through" in (program.run_dir / "log.txt").read_text()


@serial
def test_threads_the_user_asked_for(program):
    assert "threads 3 3" in program("well", n=2, env={"OMP_NUM_THREADS": "3"}).stdout


@serial
@pytest.mark.parametrize("given", ["", "0", "many", "-3", "1.5"])
def test_threads_that_are_no_number_are_the_ranks_share(program, given):
    assert "threads 1 1" in program("well", n=max(2, len(placement.cores())), env={"OMP_NUM_THREADS": given}).stdout


@serial
def test_more_threads_than_any_machine_has_are_refused(program):
    result = program("well", n=2, env={"OMP_NUM_THREADS": "100000"})
    assert result.rc == 2
    assert result.stderr.count("error: OMP_NUM_THREADS=100000: unset it") == 1


@serial
@pytest.mark.parametrize(("mode", "rc", "told"), [
    ("before", 2, "error: --model.width 7: give an even number."),
    ("no file", 2, "error: --config x: there is no such file."),
    ("no GPU", 2, "[rank 1 on {host}] error: GPU 1 cannot be used"),
    ("mistake everywhere", 2, "error: --data.path x: there is no such folder."),
    ("mistake", 2, "[rank 1 on {host}] error: only I see it"),
    ("disk", 2, "error: rank 1: OSError: [Errno 28] No space left on device"),
    ("interrupt", 130, "[rank 1 on {host}] interrupted"),
    ("interrupt everywhere", 130, "interrupted"),
    ("exit", 7, "[rank 1 on {host}] exits with 7"),
    ("exit 256", 1, "[rank 1 on {host}] exits with 256"),
    ("exit of a thread", 5, "[rank 1 on {host}] in thread loader: exits with 5"),
])
def test_what_a_user_did_is_told_once_without_traceback(program, mode, rc, told):
    result = program(mode)
    assert result.rc == rc, result
    assert result.stderr.count(told.format(host=os.uname().nodename)) == 1, result
    assert "Traceback" not in result.stderr
    assert "all through" not in result.stdout


@serial
@pytest.mark.parametrize(("mode", "rank", "told"), [
    ("bug", 1, "ValueError: a bug"),
    ("bug on root", 0, "ZeroDivisionError"),
    ("thread", 1, "ValueError: the loader broke"),
])
def test_a_bug_ends_the_job_with_the_ranks_traceback_first(program, mode, rank, told):
    result = program(mode)
    assert result.rc == 1, result
    assert result.stderr.lstrip().startswith(f"[rank {rank} on {os.uname().nodename}]")
    assert result.stderr.count("Traceback") == 1
    assert told in result.stderr
    assert "all through" not in result.stdout


@serial
def test_a_crash_shows_where_python_was(program):
    result = program("crash")
    assert result.rc != 0
    assert "program.py" in result.stderr


@serial
def test_exit_zero_is_no_failure(program):
    result = program("exit well")
    assert (result.rc, result.stderr) == (0, "")


@serial
def test_exit_zero_of_one_rank_is_told_while_it_waits(program):
    """The others may be in a collective that it will never join."""
    result = program("exit well alone")
    assert result.rc == 0, result
    assert result.stderr.count(f"[rank 1 on {os.uname().nodename}] has called sys.exit(0) and waits") == 1, result


@serial
@pytest.mark.parametrize("mode", ["mistake everywhere", "interrupt"])
def test_one_rank_without_mpirun(program, mode):
    result = program(mode, n=0)
    assert result.rc == {"mistake everywhere": 2, "interrupt": 130}[mode]
    assert len(result.stderr.splitlines()) == 1


@serial
def test_run_directory_that_cannot_be(program, tmp_path):
    (tmp_path / "run").write_text("a file")
    result = program("well")
    assert result.rc == 2
    assert result.stderr.count(f"error: --run.dir {tmp_path / 'run'}: File exists") == 1


@serial
def test_ctrl_c(program):
    """A terminal sends SIGINT to the launcher; nothing stays behind."""
    process = start(2, [str(program.file), "slow", str(program.run_dir)],
                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert any("ready" in line for line in process.stdout), "it ended by itself"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode != 0
    deadline = time.monotonic() + 60
    while running := _running(str(program.file)):
        assert time.monotonic() < deadline, running
        time.sleep(0.1)


def _running(name: str) -> list[str]:
    """Command lines of processes that have `name` among their arguments."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_text().replace("\0", " "))
        except OSError:
            continue
    return [line for line in lines if name in line]


@serial
@pytest.mark.parametrize(("variables", "told"), [
    ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "0"}, "srun started 4 processes"),
    ({"SLURM_STEP_ID": "0", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, "--mpi=pmix"),
])
def test_ranks_that_believe_they_are_alone_are_refused(program, variables, told):
    result = program("well", n=0, env=variables)
    assert result.rc == 2
    assert told in result.stderr
    assert "Traceback" not in result.stderr
    assert "all through" not in result.stdout


@serial
def test_a_batch_shell_is_not_refused(program):
    assert program("well", n=0, env={"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}).rc == 0


@serial
def test_another_mpis_mpirun_is_refused(program):
    """MPILM_OTHER_MPIRUN: the mpirun of an MPI that is not this environment's."""
    other = os.environ.get("MPILM_OTHER_MPIRUN", "")
    if not other:
        pytest.skip("only one MPI here")
    result = program("well", launcher=[other])
    assert result.rc == 2, result
    assert "and they cannot talk to each other" in result.stderr
    assert f"{sys.prefix}/bin/mpirun" in result.stderr
    assert "all through" not in result.stdout


def test_a_session_inside_a_running_program(comm, tmp_path_all, capsys):
    with session(run_dir=tmp_path_all / "run") as world:
        assert (world.rank, world.size) == (comm.rank, comm.size)
        assert world.local_size <= world.size
        assert world.threads >= 1
        assert world.dup("test").allreduce(1) == world.size
        say("told once")
    assert comm.allreduce(capsys.readouterr().out.count("told once")) == 1
    with pytest.raises(UserError, match="mine"), session():
        raise UserError("mine")
