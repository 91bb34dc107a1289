"""A rank that dies before there is anything that could be revoked: the others tell, and the job ends."""

from __future__ import annotations

import pytest
from mpi4py import MPI

from mpilm import starting
from mpilm.log import UserError
from tests.helpers import run_nested

pytestmark = pytest.mark.serial
# Rank 1 is killed when it calls what the first argument names.
PROGRAM = """
import os, signal, sys
from mpilm import failure, launch, startup

def die(function):
    def deadly(*args):
        if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args)
    return deadly

owner, name = {"init": (startup, "start_mpi"), "guard": (failure.Guard, "__init__"),
               "greet": (launch, "greet")}[sys.argv[1]]
setattr(owner, name, die(getattr(owner, name)))
with launch.session(run_dir=sys.argv[2]):
    print("started", flush=True)
"""


@pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="needs ULFM: Open MPI")
@pytest.mark.parametrize("moment", ["init", "guard", "greet"])
def test_a_rank_is_killed_while_mpi_starts(tmp_path, moment):
    result = run_nested(3, ["-c", PROGRAM, moment, str(tmp_path)], launcher=["--with-ft", "ulfm"], timeout=60,
                        env={starting.VARIABLE: "3"})
    assert result.rc == starting.FAILED, result
    assert "a rank has died or is missing while MPI starts" in result.stderr
    assert "[rank 0 on " in result.stderr or "[rank 2 on " in result.stderr
    assert "the same command starts again" in result.stderr
    assert "started" not in result.stdout


def test_more_ranks_may_take_longer_and_a_person_says_how_long(monkeypatch):
    monkeypatch.delenv(starting.VARIABLE, raising=False)
    assert starting.limit_s(2) >= 300
    assert starting.limit_s(10000) > 2 * starting.limit_s(2)
    monkeypatch.setenv(starting.VARIABLE, "2.5")
    assert starting.limit_s(10000) == 2.5
    for nonsense in ("", "soon", "-1", "nan", "inf"):
        monkeypatch.setenv(starting.VARIABLE, nonsense)
        with pytest.raises(UserError, match=starting.VARIABLE):
            starting.limit_s(2)
