"""What happens before MPI_Init: launchers and libraries that do not match, GPUs, malloc, and `--help` without MPI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from mpilm import placement, startup
from tests.helpers import REPOSITORY, clean_environment, run_nested

serial = pytest.mark.serial
PROBE = """
import os, sys
from mpilm.startup import tune_malloc
print("pid", os.getpid(), flush=True)
tune_malloc()
print(os.environ["GLIBC_TUNABLES"], sys.argv[1:])
"""


@pytest.mark.parametrize(("environ", "vendor", "expected"), [
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "MPICH", True),
    ({"OMPI_COMM_WORLD_SIZE": "2", "MPIR_CVAR_PMI_VERSION": "x"}, "MPICH", False),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, "Open MPI", False),
    ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "Open MPI", True),
    ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2", "PMIX_NAMESPACE": "job"}, "Open MPI", False),
    ({"PMI_SIZE": "2", "MPI_LOCALNRANKS": "2"}, "MPICH", False),
    ({"PMI_SIZE": "2"}, "Open MPI", False),
    ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "Open MPI", False),
])
def test_launchers_and_libraries_that_cannot_work_together(environ, vendor, expected):
    launcher = placement.launcher(environ)
    assert launcher is not None
    assert startup._strangers(launcher, vendor, environ) is expected


@serial
def test_as_many_files_may_be_open_as_the_system_allows():
    program = ("import resource; from mpilm import startup; kind = resource.RLIMIT_NOFILE; "
               "resource.setrlimit(kind, (64, 500)); startup.allow_open_files(); print(resource.getrlimit(kind))")
    result = subprocess.run([sys.executable, "-c", program], env=clean_environment(), capture_output=True, text=True,
                            check=False)
    assert result.stdout == "(500, 500)\n", result


@serial
def test_no_gpu_here_is_the_cpu():
    if Path("/dev/nvidiactl").exists():
        pytest.skip("there is a GPU")
    assert startup.choose_gpu(0) == "cpu"


@serial
def test_malloc_is_tuned_once_and_can_be_declined(tmp_path):
    package = tmp_path / "data_prep"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "probe.py").write_text(PROBE)
    path = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    result = run_nested(0, ["-m", "data_prep.probe", "a b"], cwd=tmp_path, env=path, tuned=True)
    lines = result.stdout.splitlines()
    assert lines[0] == lines[1], "a new pid, which the launcher does not know"
    assert lines[2:] == [f"{startup.MALLOC} ['a b']"]
    declined = run_nested(0, ["-m", "data_prep.probe"], cwd=tmp_path, env=path)
    assert declined.stdout.splitlines()[1:] == [" []"]


@serial
def test_no_mpi_library(tmp_path):
    """An environment that sees our packages, mpi4py among them, but holds no MPI."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path)], check=True)
    packages = next((tmp_path / "lib").glob("python*/site-packages"))
    (packages / "ours.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    program = "from mpilm.launch import session\nwith session(): pass"
    result = subprocess.run([tmp_path / "bin" / "python", "-c", program], capture_output=True, text=True, check=False,
                            env=clean_environment() | {"LD_LIBRARY_PATH": ""})
    if result.returncode == 0:
        pytest.skip("the system has an MPI of its own")
    assert result.returncode == 2
    assert "error: there is no MPI for this Python" in result.stderr
    assert "Traceback" not in result.stderr


LOADED = """
import gc
from mpilm.startup import loading
with loading():
    assert not gc.isenabled()
    import torch
print(gc.isenabled(), gc.get_freeze_count() > 1e5, sum(map(gc.is_tracked, gc.get_objects())) < 1e4)
with loading():
    print(gc.isenabled())
"""


@serial
def test_what_is_loaded_is_no_garbage():
    """The collector is off meanwhile, and has little to look through afterwards; PyTorch that was there is left."""
    assert run_nested(0, ["-c", LOADED], cwd=REPOSITORY).stdout == "True True True\nTrue\n"


@serial
@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "inspect", "bench"])
def test_help_needs_nothing_heavy(name):
    result = run_nested(0, ["-X", "importtime", "-m", f"mpilm.{name}", "--help"])
    assert result.rc == 0, result
    assert "usage:" in result.stdout
    modules = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not modules & {"torch", "numpy", "mpi4py.MPI", "h5py", "tokenizers", "tensorboard"}


@serial
def test_by_path_it_is_the_same_program():
    """Whatever lies beside it and is called like a module of Python's own."""
    by_name, by_path = (run_nested(0, [*program, "--help"], cwd=REPOSITORY) for program in (["-m", "mpilm.train"],
                                                                                             ["mpilm/train.py"]))
    assert by_path.rc == 0, by_path
    assert by_path.stdout.partition("\n")[2] == by_name.stdout.partition("\n")[2]


@serial
def test_programs_that_compile_nothing_do_not_load_the_compiler():
    program = "import sys, mpilm.assemble; print('torch._dynamo' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", program], env=clean_environment(), cwd=REPOSITORY,
                            capture_output=True, text=True, check=False)
    assert result.stdout == "False\n", result


@pytest.mark.serial
def test_a_stream_that_was_closed_is_nowhere(tmp_path):
    """And no file is taken for it, nor does a mistake end in a traceback for want of it."""
    program = ("import os, sys; from mpilm import launch\n"
               "def main():\n"
               f"    file = open({str(tmp_path / 'file')!r}, 'w')\n"
               "    os.write(1, b'lost')\n"
               "    print('lost', file=sys.stderr)\n"
               "    sys.exit(file.fileno() < 3)\n"
               "launch.command(main, tune=False)")
    done = subprocess.run(["sh", "-c", 'exec "$0" -c "$1" <&- >&- 2>&-', sys.executable, program], check=False)
    assert (done.returncode, (tmp_path / "file").read_text()) == (0, "")
