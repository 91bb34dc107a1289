"""The clocks alone: any order of arrivals, any bound, and nobody is stuck."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.log import UserError
from mpilm.options import parse
from mpilm.sync import _staleness
from mpilm.sync._clocks import Clocks
from mpilm.sync._reply import Reply
from mpilm.sync._staleness import LAMBDA, Staleness

pytestmark = pytest.mark.serial


@given(st.integers(1, 5), st.sampled_from([1, 2, 5, float("inf")]), st.sampled_from([2, 3, 99]), st.randoms())
def test_the_bound_holds_and_the_end_is_reached(workers, staleness, every, draw):
    """Whoever computes is never more ahead than allowed, nor past a step at which all meet."""
    clocks = Clocks(workers, staleness=staleness, start=0, steps=7, meets=lambda step: step % every == 0)
    assert clocks.release() == list(range(workers))
    while not clocks.over:
        worker = draw.choice(sorted(clocks.computing))
        clocks.advance([worker])
        for ahead in clocks.computing:
            assert clocks.done[ahead] - clocks.slowest <= staleness
            assert clocks.done[ahead] // every <= (clocks.slowest // every)
        assert clocks.met is (clocks.slowest == max(clocks.done) and (clocks.slowest % every == 0 or clocks.over))
    assert clocks.version == 7 * workers
    assert clocks.computing == clocks.waiting == set()


def test_together_a_step_is_one_update():
    """And never stale."""
    clocks = Clocks(3, staleness=0, start=4, steps=6, meets=lambda step: False)
    clocks.release()
    assert clocks.lag([0, 1, 2]) == 0
    assert clocks.advance([0, 1, 2]) == [0, 1, 2]
    assert (clocks.version, clocks.slowest, clocks.met, clocks.over) == (1, 5, True, False)
    assert clocks.lag([0, 1, 2]) == 0


def test_staleness_counts_updates_of_others_in_between():
    """The mean step weighs workers by what they do of one."""
    clocks = Clocks(2, staleness=float("inf"), start=0, steps=9, meets=lambda step: False, shares=[3, 1])
    clocks.release()
    for _ in range(3):
        assert clocks.lag([0]) == 0
        clocks.advance([0])
    assert clocks.lag([1]) == 3
    assert clocks.mean == 9 / 4


def test_a_resumed_run_that_is_over_has_nothing_to_compute():
    """Everyone gets the parameters all the same."""
    clocks = Clocks(2, staleness=1, start=5, steps=5, meets=lambda step: False)
    assert clocks.release() == [0, 1]
    assert clocks.over and not clocks.computing


def test_rules():
    """What each does to a gradient and to the learning rate; a present gradient is left alone."""
    import torch

    assert [_staleness.get("none").rate(staleness) for staleness in (0, 1, 4)] == [1, 1, 1]
    assert [_staleness.get("scale").rate(staleness) for staleness in (0, 1, 4)] == [1, 1, 0.25]
    gradient, masters, pulled = torch.tensor([2.0, -3.0]), torch.tensor([1.0, 1.0]), torch.tensor([0.5, 1.0])
    _staleness.get("compensate").correct(gradient, masters, pulled)
    assert torch.equal(gradient, torch.tensor([2.0 + LAMBDA * 4.0 * 0.5, -3.0]))
    with pytest.raises(UserError, match="none, scale, compensate"):
        _staleness.get("ignore")


def test_what_is_told_of_staleness():
    """It survives its way to a worker."""
    staleness = Staleness()
    for value in (0, 1, 1, 2, 3, 9):
        staleness.note(value)
    reply = Reply(version=7, done=2.5, grad_norm=0.25, lr=1e-3, applied=6, skipped=1, skipped_in_a_row=0,
                  staleness=staleness)
    again = Reply.from_array(reply.to_array())
    assert again == reply
    assert again.staleness.told() == {"staleness_mean": 16 / 6, "staleness_max": 9,
                                      "staleness_histogram": {"0": 1, "1": 2, "2-3": 2, "8-15": 1}}


@pytest.mark.parametrize(("options", "words"), [
    (["--sync.staleness", "3"], "--run.reproducible false"),
    (["--sync.staleness", "inf"], "--run.reproducible false"),
    (["--sync.staleness", "-1", "--run.reproducible", "false"], "a whole number from 0 up, or inf"),
    (["--sync.servers", "0"], "sync.servers 0"),
    (["--sync.compress", "bf16", "--run.reproducible", "false"], "--sync.compress none"),
    (["--sync.staleness_rule", "hope"], "none"),
])
def test_what_cannot_work_is_refused_with_the_remedy(options, words):
    """Before anything is built."""
    with pytest.raises(UserError, match=words):
        parse(["--sync.kind", "parameter_server", *options])
