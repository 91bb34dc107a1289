"""The arithmetic of memory beside what torch keeps, byte for byte, and what must be so whatever the numbers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.comm import order
from mpilm.model import activations, count, head, memory, tiling
from mpilm.model.activations import Work
from mpilm.model.gpt import GPT
from mpilm.model.memory import Division
from mpilm.model.shape import Shape
from mpilm.sync import _slots, sharded
from tests.memory_cases import SHAPE, kept, part_of

pytestmark = pytest.mark.serial


@pytest.mark.parametrize("element", [2, 4])
@pytest.mark.parametrize(("sequences", "length"), [(3, 40), (2, 256), (1, 512)])
def test_a_block_keeps_what_is_counted(sequences, length, element):
    """A compiled one: parallel/test_footprint.py."""
    work = Work(sequences, length, element)
    assert kept(part_of(range(1, 2), work), work) == activations.block(SHAPE, work)


def test_a_long_sequence_keeps_no_probabilities():
    """PyTorch's own kernel; what it hands out may be laid out as the next matrix takes it."""
    work = Work(1, 2 * tiling.LONGEST)
    measured = kept(part_of(range(1, 2), work), work)
    assert measured == pytest.approx(activations.block(SHAPE, work), rel=0.05)


@pytest.mark.parametrize("element", [2, 4])
def test_documents_are_masked_once_for_all_blocks(element):
    plain, masked = (Work(2, tiling.LONGEST + 64, element, documents=documents) for documents in (False, True))
    part = part_of(range(1, 3), plain)
    rotary = part.places(torch.zeros(2, plain.length), None).rotary.nbytes      # documents have their own
    assert kept(part, masked) - kept(part, plain) - rotary == (activations.kept(SHAPE, range(1, 3), masked)
                                                               - activations.kept(SHAPE, range(1, 3), plain))


@pytest.mark.parametrize("element", [2, 4])
def test_the_head_keeps_two_gradients(element):
    work = Work(2, 64, element)
    expected = activations.kept(SHAPE, range(3, 4), work) - work.between(SHAPE)      # what came from the stage before
    assert kept(part_of(range(3, 4), work), work) == expected


def test_all_parameters_are_somewhere():
    assert sum(memory.parameters(SHAPE, [range(4)]).values()) == count.parameters(SHAPE)
    part = GPT(SHAPE, range(2, 4))
    assert memory.parameters(SHAPE, [range(2, 4)]) == {name: p.numel() for name, p in part.named_parameters()}


def test_numbers_that_stand_in_two_places_agree():
    assert (memory.BLOCK, memory.NUM_ROOMS, activations.CHUNK) == (order.BLOCK, sharded.NUM_ROOMS, head.CHUNK)
    for num_slots in (1, 2, 4, 8, 64):
        division = Division(num_slots=num_slots, reproducible=True)
        assert division.buffers == _slots.num_buffers(_slots.tree_visits(num_slots))


@settings(max_examples=40, deadline=None)
@given(layers=st.integers(2, 9), replicas=st.integers(1, 8), level=st.sampled_from([0, 1, 2, 3]),
       tp=st.sampled_from([1, 2, 4]))
def test_what_is_divided_falls(layers, replicas, level, tp):
    """More replicas, a higher level and more ranks that share layers never take more; all together hold all."""
    shape = Shape(layers=layers, width=256, heads=8, hidden=704, vocab_size=4096)
    units = [range(shape.units)]

    def held(level=level, tp=tp):
        return memory.held(shape, units, Division(replicas, level=level, tp=tp))

    one, whole = held(), held(level=0)
    assert one.masters + one.optimizer <= whole.masters + whole.optimizer
    assert replicas * one.optimizer >= held(level=0).optimizer if level else one == whole
    slack = memory.BLOCK * 4 * (1 + len(shape.parameters()))     # what is cut is cut between blocks
    assert held(tp=2 * tp).total <= one.total
    if level > 1:
        assert one.gradients <= held(level=1).gradients + 2 * 4 * max(memory.parameters(shape, units).values()) + slack
    if replicas > 1:
        assert one.optimizer <= whole.optimizer // (replicas if level else 1) + slack


@settings(max_examples=40, deadline=None)
@given(sequences=st.integers(1, 4), length=st.sampled_from([64, 256, 2048]), tp=st.sampled_from([1, 2, 4]),
       cp=st.sampled_from([1, 2, 4]))
def test_passes_that_are_shared_keep_less(sequences, length, tp, cp):
    shape = Shape(layers=3, width=256, heads=8, hidden=704, vocab_size=4096)
    units = range(shape.units)
    one, work = Work(sequences, length), Work(sequences, length, tp=tp, cp=cp)
    for of in (activations.kept, activations.needed):
        assert of(shape, units, work) <= of(shape, units, one)
    assert activations.kept(shape, units, work) * tp * cp >= activations.kept(shape, units, one) * 0.6 / (
        1 if length > 1024 else 2)
    again = Work(sequences, length, tp=tp, cp=cp, recompute=True)
    assert activations.kept(shape, units, again) < activations.kept(shape, units, work)
    assert activations.deferred(shape, units, work) < activations.kept(shape, units, work)
