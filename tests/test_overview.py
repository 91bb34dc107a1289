"""python -m mpilm: every command is there, with what it does."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import mpilm
from mpilm.__main__ import COMMANDS

ROOT = Path(mpilm.__file__).parents[1]
pytestmark = pytest.mark.serial


def test_every_command_is_listed():
    """Every module that can be run, but for those that only others start."""
    files = [*ROOT.glob("mpilm/**/*.py"), *ROOT.glob("data_prep/**/*.py")]
    found = {str(file.relative_to(ROOT).with_suffix("")).replace("/", ".") for file in files
             if '__name__ == "__main__"' in file.read_text() and not re.match("_[a-z]", file.name)}
    assert found - {"mpilm.__main__"} == set(COMMANDS)


def test_it_is_told_without_mpi():
    """A line each, and the first thing to type."""
    told = subprocess.run([sys.executable, "-m", "mpilm"], capture_output=True, text=True, check=True, timeout=60)
    lines = told.stdout.splitlines()
    assert any(line.startswith("mpilm.inspect") and line.endswith("What is in a checkpoint.") for line in lines)
    assert "mpirun -np 2 python -m mpilm.train" in lines[-1]
