"""An update that is cut short anywhere, and finished by somebody else, has the bits of one that was not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpilm.comm.node import Node
from mpilm.config import Optim
from mpilm.flat import Flat
from mpilm.optim import Update
from mpilm.sync import _journal
from mpilm.sync._journal import Journal

pytestmark = pytest.mark.serial
COUNTS = (100, 48, 16)      # elements of the zones of a segment
PIECE = 32


class Killed(BaseException):
    """In the place of SIGKILL, at a point where it would leave memory torn."""


def segment(seed):
    """Flat memory with values, bf16 weights beside it."""
    draw = torch.Generator().manual_seed(seed)
    return [Flat(torch.randn(count, generator=draw), torch.zeros(count, dtype=torch.bfloat16),
                 (torch.randn(count, generator=draw),), (torch.zeros(count), torch.zeros(count)), decay=count > 20)
            for count in COUNTS]


def bits(flats):
    """Everything but gradients, which an update uses up."""
    return [array.view(torch.uint8).numpy().tobytes() for flat in flats
            for array in (flat.masters, flat.weights, *flat.states)]


@pytest.fixture
def rule(monkeypatch):
    """AdamW in pieces of a few elements."""
    monkeypatch.setattr(_journal, "PIECE", PIECE)
    update = Update(Optim(lr=0.1, warmup_steps=0), 10)
    update.begin(0)
    return update, update.accept(1.0)


def torn(update, scale, after):
    """Applies `after` pieces, and the next one by half, in place of its state as well."""
    calls = [0]

    def apply(flat):
        if calls[0] == after:
            half = flat.masters.numel() // 2
            update.apply(Flat(flat.masters[:half], flat.weights[:half], (flat.gradients[0][:half],),
                              tuple(state[:half] for state in flat.states), flat.decay), scale)
            raise Killed
        calls[0] += 1
        update.apply(flat, scale)
    return apply


@pytest.mark.parametrize("after", range(sum(-(-count // PIECE) for count in COUNTS)))
def test_what_was_cut_short_is_finished_to_the_bit(comm, rule, after):
    update, scale = rule
    whole, cut = segment(1), segment(1)
    for flat in whole:
        update.apply(flat, scale)
    journal = Journal(Node.build(comm), num_states=2)
    journal.step = 1
    with pytest.raises(Killed):
        journal.run(0, cut, torn(update, scale, after))
    journal.run(0, cut, lambda flat: update.apply(flat, scale))
    assert bits(cut) == bits(whole)


def test_what_is_finished_is_not_done_again(comm, rule):
    update, scale = rule
    flats, journal = segment(2), Journal(Node.build(comm), num_states=2)
    journal.step = 1
    journal.run(0, flats, lambda flat: update.apply(flat, scale))
    once = bits(flats)
    journal.run(0, flats, lambda flat: pytest.fail("there was nothing left"))
    assert bits(flats) == once


def test_a_record_of_an_earlier_update_says_nothing_about_this_one(comm, rule):
    update, scale = rule
    flats, twice, journal = segment(3), segment(3), Journal(Node.build(comm), num_states=2)
    for step in (1, 2):
        journal.step = step
        journal.run(0, flats, lambda flat: update.apply(flat, scale))
        for flat in twice:
            update.apply(flat, scale)
    assert bits(flats) == bits(twice)
    assert np.all(journal.records[0, :3] == [2, 7, 7])
