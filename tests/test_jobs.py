"""The presets are valid and as large as their names say; the batch scripts say what they are for."""

from __future__ import annotations

import pytest

from mpilm import config, options
from mpilm.model import count
from mpilm.model.shape import Shape
from tests.helpers import REPOSITORY

pytestmark = pytest.mark.serial
SCALE = {"m": 1e6, "b": 1e9}
PRESETS = sorted((REPOSITORY / "jobs").glob("*.toml"))
SCRIPTS = sorted((REPOSITORY / "jobs").glob("*.slurm"))


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


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_script_tells_how_to_submit_it(path):
    head = path.read_text().split("#SBATCH")[0]
    assert f"sbatch jobs/{path.name}" in head
    assert "set -euo pipefail" in path.read_text()
