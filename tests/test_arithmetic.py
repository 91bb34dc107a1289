"""How a run computes: as it was told, else as it did before, else in what is faster here."""

from __future__ import annotations

import pytest
import torch

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


@pytest.mark.ranks(max=1)
@pytest.mark.parametrize(("threads", "reproducible", "told"), [
    (0, True, "each rank computes with 1 thread instead of 4, so that the bits"), (0, False, ""), (4, True, ""),
    (3, False, "each rank computes with 3 threads instead of 4, as --run.threads says")])
def test_threads_that_are_not_the_ranks_share_are_told(monkeypatch, capsys, threads, reproducible, told):
    """The placement table has the share."""
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    config, before = configuration(), torch.get_num_threads()
    config.run.threads, config.run.reproducible = threads, reproducible
    with session() as world:
        found = arithmetic.set_threads(config, world)
    assert (found, torch.get_num_threads()) == (threads or (1 if reproducible else 4),) * 2
    said = capsys.readouterr().out
    assert said.startswith(told) and bool(said) == bool(told)
    torch.set_num_threads(before)
