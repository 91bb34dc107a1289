"""Codes in zstd: what arrives is what was sent, it takes fewer bytes, and the quicker way is found."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpilm.comm.network import Line, emulated
from mpilm.comm.p2p import Traffic
from mpilm.sync import compress
from mpilm.sync.compress._exchange import Exchange
from mpilm.sync.compress._parcels import HEAD, Parcel, Quicker
from tests.helpers import everywhere


def parcel(data: bytes) -> Parcel:
    """With these codes in it."""
    made = Parcel(len(data))
    made.codes[:] = np.frombuffer(data, np.uint8)
    return made


@pytest.mark.serial
@given(data=st.one_of(st.binary(max_size=2000), st.integers(0, 5000).map(bytes)), small=st.booleans())
def test_a_parcel_comes_out_as_it_went_in(data, small):
    """Whatever is in it; never longer than as it is."""
    size = len(data) * 2 // 3       # a last piece is shorter than its room
    packed, there = parcel(data).pack(size, small=small), Parcel(len(data))
    assert packed.size <= HEAD + size
    there.room[:packed.size] = packed
    there.unpack(size)
    assert there.codes[:size].tobytes() == data[:size]


@pytest.mark.serial
def test_empty_blocks_take_no_room():
    """And random bytes stay as they are."""
    assert parcel(bytes(100_000)).pack(100_000, small=True).size < 100
    assert parcel(bytes(100_000)).pack(100_000, small=False).size == HEAD + 100_000
    noise = np.random.default_rng(1).bytes(1000)
    assert parcel(noise).pack(1000, small=True).size == HEAD + 1000


def gradient(comm: MPI.Comm, step: int) -> np.ndarray:
    """Mostly small values, as gradients are."""
    random = np.random.default_rng([comm.rank, step])
    return (random.standard_t(3, 200_000) * 1e-3).astype(np.float32)


@pytest.mark.parametrize("packs", ["all", "some"])
def test_packing_changes_no_bit(packs, comm: MPI.Comm):
    """Of sums and residuals, over several steps; also if some ranks pack and others do not."""
    plain, packed = (Exchange(compress.get("int8")(), comm, 200_000, small=small)
                     for small in (False, packs == "all" or comm.rank % 2 == 0))
    for step in range(3):
        one, other = gradient(comm, step), gradient(comm, step)
        before = Traffic.sent
        plain.reduce(one)
        between = Traffic.sent
        packed.reduce(other)
        everywhere(comm, np.array_equal(one, other) and torch.equal(plain.lost, packed.lost), f"step {step}")
        everywhere(comm, comm.size == 1 or not packed.small or Traffic.sent - between < 0.9 * (between - before),
                   f"bytes of step {step}")


@pytest.mark.slow
@pytest.mark.ranks(min=2)
def test_a_slow_line_is_noticed(comm: MPI.Comm):
    """What all ranks agree on."""
    exchange = Exchange(compress.get("int8")(), comm, 200_000)
    with emulated(Line(mbit_s=8)):
        for step in range(8):
            exchange.reduce(gradient(comm, step))
    everywhere(comm, exchange.quicker.next(), "packed")


@pytest.mark.serial
def test_the_quicker_way_is_taken_and_the_other_tried_again():
    """First each twice, then the better one; after a change, the other."""
    quicker, seconds, went = Quicker(), {False: 1.0, True: 2.0}, []
    for turn in range(200):
        if turn == 100:
            seconds[False] = 9.0
        went.append(quicker.next())
        quicker.note(went[-1], seconds[went[-1]])
    assert sorted(went[:4]) == [False, False, True, True]
    assert not any(went[4:31]) and went[31] and not any(went[32:63]), "once in 32 the other"
    assert all(went[102:127]), "two times after the change"
