"""Sums of squares for the norm: of everyone's addends, in one pass, they are those of their sum, however it is cut."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.comm.devices import HOST
from mpilm.comm.order import BLOCK
from mpilm.flat import add
from mpilm.sync import _squares

pytestmark = [pytest.mark.serial, pytest.mark.filterwarnings("ignore")]     # the compiler warns of its own code
BLOCKS = 5


def found(way, part=slice(0, BLOCKS * BLOCK), **gradients):
    out = np.full((part.stop - part.start) // BLOCK, np.nan)
    way(SimpleNamespace(**gradients), part, out)
    return out


@settings(max_examples=20)
@given(number=st.sampled_from([1, 3, 8]), first=st.integers(0, BLOCKS - 1), length=st.integers(1, BLOCKS),
       seed=st.integers(0, 99))
def test_no_bit_depends_on_who_adds_up_what(number, first, length, seed):
    """Nor on which part of a segment is whose; and they are what they should be."""
    draw = torch.Generator().manual_seed(seed)
    scales = torch.exp(4 * torch.randn(number, generator=draw))
    addends = [(scale * torch.randn(BLOCKS * BLOCK, generator=draw)).bfloat16() for scale in scales]
    total, part = add(addends), slice(first * BLOCK, min(first + length, BLOCKS) * BLOCK)
    way = _squares.by(HOST, compiled=True)
    apart, written = found(way, part, addends=addends), found(way, addends=[total])
    assert apart.tolist() == written[part.start // BLOCK:part.stop // BLOCK].tolist()
    exact = total[part].double().view(-1, BLOCK).square().sum(1)
    np.testing.assert_allclose(apart, exact.numpy(), rtol=1e-5)


def test_both_ways_are_near():
    """One by BLAS, the other compiled; only the latter waits until all is there."""
    values = torch.randn(BLOCKS * BLOCK, generator=torch.Generator().manual_seed(1))
    in_parts, in_one_pass = (_squares.by(HOST, compiled=compiled) for compiled in (False, True))
    assert (in_parts.late, in_one_pass.late) == (False, True)
    np.testing.assert_allclose(found(in_parts, values=values.numpy()), found(in_one_pass, addends=[values]), rtol=1e-5)
