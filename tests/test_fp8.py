"""Training with `--run.precision fp8`: the same bits on any layout, near bf16, and refused where it cannot be."""

from __future__ import annotations

import pytest

from mpilm.log import UserError
from tests import datasets
from tests.helpers import everywhere
from tests.small_jobs import train_here
from tests.training_cases import alone, apart, configuration, parallel, same

LAYOUTS = {"replicas": {}, "stages": {"pp": 2}, "zero bubble": {"pp": 2, "schedule": "zb"},
           "recomputed": {"recompute": True}}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_bits_are_those_of_one_rank(layout, comm):
    """Losses, norms and weights of three steps."""
    options = LAYOUTS[layout]
    if comm.size % options.get("pp", 1):
        pytest.skip(f"two stages on {comm.size} ranks")
    everywhere(comm, same(alone(configuration(), precision="fp8"),
                          parallel(configuration(**options), precision="fp8")))


@pytest.mark.serial
def test_it_is_near_bf16():
    """And not the same."""
    half, low = (alone(configuration(), precision=precision) for precision in ("bf16", "fp8"))
    assert 0 < max(abs(a - b) for a, b in zip(half[0], low[0], strict=True)) < 0.05
    assert apart(low, half) > 0


@pytest.mark.serial
def test_a_run_trains_saves_and_goes_on(tmp_path):
    """By its own precision, which the checkpoint knows; what does not fit is refused."""
    data = datasets.small(tmp_path / "data")
    fits = {"model.width": 32, "model.heads": 2, "model.hidden": 64}
    train_here(data, tmp_path / "run", **fits, **{"run.precision": "fp8"})
    train_here(data, tmp_path / "run", **fits, **{"run.precision": "auto", "run.steps": 4})
    assert '"precision": "fp8"' in next((tmp_path / "run").glob("checkpoints/*4/manifest.json")).read_text()
    with pytest.raises(UserError, match="tp, is 72"):
        train_here(data, tmp_path / "other", **fits | {"model.hidden": 72}, **{"run.precision": "fp8"})
