"""How a run computes: as it was told, else as it did before, else in what is faster here."""

from __future__ import annotations

import pytest

from mpilm import arithmetic, assemble
from mpilm.launch import session
from tests.training_cases import VOCAB, configuration


@pytest.mark.parametrize(("given", "recorded", "chosen"), [
    ("auto", "bf16", "bf16"), ("auto", "fp32", "fp32"), ("fp32", "bf16", "fp32"), ("bf16", "fp32", "bf16")])
def test_a_run_goes_on_in_the_precision_that_it_began_in(given, recorded, chosen):
    """On whatever machine; unless another one is asked for."""
    config = configuration()
    config.run.precision, config.run.compile = given, "off"
    with session() as world:
        found, _ = arithmetic.decide(config, world, assemble.shape_of(config, VOCAB), {"precision": recorded})
    assert found.precision == chosen
