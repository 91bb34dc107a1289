"""Training with `--run.precision fp8`: the same bits on any layout, near bf16, and refused where it cannot be."""

from __future__ import annotations

import json

import pytest

from mpilm import assemble, resume, trained
from mpilm.log import UserError
from mpilm.parallel import pipeline
from tests import datasets
from tests.helpers import everywhere
from tests.small_jobs import train_here
from tests.training_cases import alone, apart, configuration, parallel, same

LAYOUTS = {"replicas": {}, "stages": {"pp": 2}, "zero bubble": {"pp": 2, "schedule": "zb"},
           "recomputed": {"recompute": True}, "divided weights": {"collective": "tree", "kind": "sharded", "level": 3}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_are_those_of_one_rank(layout, comm):
    """Losses, norms and weights of three steps."""
    options = LAYOUTS[layout]
    if comm.size % options.get("pp", 1) or ("collective" in options and comm.size == 3):
        pytest.skip(f"{layout} on {comm.size} ranks")
    everywhere(comm, same(alone(configuration(), precision="fp8"),
                          parallel(configuration(**options), precision="fp8")))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")     # the compiler warns of its own code
def test_compiled_code_has_the_bits_of_one_rank_too(comm):
    """Replicas of it."""
    everywhere(comm, same(alone(configuration(layers=1), precision="fp8", compiled=True),
                          parallel(configuration(layers=1), precision="fp8", compiled=True)))


@pytest.mark.serial
def test_it_is_near_bf16():
    """And not the same."""
    half, low = (alone(configuration(), precision=precision) for precision in ("bf16", "fp8"))
    assert 0 < max(abs(a - b) for a, b in zip(half[0], low[0], strict=True)) < 0.05
    assert apart(low, half) > 0


@pytest.mark.serial
def test_a_run_trains_saves_and_goes_on(tmp_path, comm):
    """By its own precision, which the checkpoint knows, and whose loss evaluation finds; what does not fit is refused.
    """
    data = datasets.small(tmp_path / "data")
    fits = {"model.width": 32, "model.heads": 2, "model.hidden": 64}
    train_here(data, tmp_path / "run", **fits, **{"run.precision": "fp8"})
    train_here(data, tmp_path / "run", **fits, **{"run.precision": "auto", "run.steps": 4, "log.validate_every": 4})
    reader = resume.open_run(str(tmp_path / "run"), comm)
    assert reader.meta["arithmetic"]["precision"] == "fp8"
    alone_again = pipeline.alone(trained.model(reader))
    told = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert assemble.validation(resume.config_of(reader), alone_again, comm).loss() == told["validation_loss"]
    with pytest.raises(UserError, match="tp, is 72"):
        train_here(data, tmp_path / "other", **fits | {"model.hidden": 72}, **{"run.precision": "fp8"})
