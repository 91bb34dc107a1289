"""The precision that is fastest here is measured, and what is very slow is not waited for."""

from __future__ import annotations

import pytest

from mpilm.model import precision

pytestmark = pytest.mark.serial


def test_each_has_a_speed():
    speeds = precision.measure(precision.DTYPES, sizes=(16, 32), rounds=2)
    assert set(speeds) == {"fp32", "bf16"}
    assert all(speed > 0 for speed in speeds.values())
    assert set(precision.measure(["fp32"], sizes=(16,), rounds=1)) == {"fp32"}


def test_what_is_too_slow_is_not_tried_at_larger_sizes(monkeypatch):
    """A product that takes seconds, on a processor without units for it."""
    tried = []

    def seconds(a):
        tried.append((a.dtype, a.shape[0]))
        return 1e-3 if a.dtype == precision.DTYPES["fp32"] else {16: 2e-3, 32: 2e-2}[a.shape[0]]

    monkeypatch.setattr(precision, "_time", seconds)
    speeds = precision.measure(precision.DTYPES, sizes=(16, 32, 64), rounds=1)
    assert (precision.DTYPES["bf16"], 64) not in tried
    assert (precision.DTYPES["fp32"], 64) in tried
    assert speeds == {"fp32": 2 * 64**3 / 1e-3, "bf16": 2 * 32**3 / 2e-2}
    assert precision.best(speeds) == "fp32"


def test_bf16_must_be_clearly_faster():
    assert precision.best({"fp32": 1.0, "bf16": 1.1}) == "fp32"
    assert precision.best({"fp32": 1.0, "bf16": 2.0}) == "bf16"
