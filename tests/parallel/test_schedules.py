"""Schedules are lists: everything once, in order, never a deadlock, and as good as their papers say."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpilm.log import UserError
from mpilm.parallel import schedules
from mpilm.parallel.schedules import Action, Kind
from mpilm.parallel.simulate import Cost, DeadlockError, ascending, play

pytestmark = pytest.mark.serial
names = st.sampled_from(sorted(schedules.MENU))
# Neither the ranks nor the chunks need divide the micro-batches.
sizes = {"ranks": st.integers(1, 8), "micro_batches": st.integers(0, 20), "chunks": st.integers(1, 4)}
every_schedule = pytest.mark.parametrize("name", sorted(schedules.MENU))


def lists(name, ranks, micro_batches, chunks=1):
    """Of all ranks, and the chunks that the schedule really has."""
    chunks = chunks if schedules.get(name).chunked else 1
    return schedules.get(name).all_ranks(ranks, micro_batches, chunks), chunks


@given(names, *sizes.values())
def test_every_micro_batch_passes_every_chunk_once(name, ranks, micro_batches, chunks):
    """Forward and backward, or forward and both halves; each kind in ascending order."""
    of_ranks, chunks = lists(name, ranks, micro_batches, chunks)
    kinds = "FIW" if schedules.get(name).split else "FB"
    wanted = Counter(Action(Kind(kind), number, chunk) for kind in kinds for number in range(micro_batches)
                     for chunk in range(chunks))
    for actions in of_ranks:
        assert Counter(actions) == wanted
        assert ascending(actions)


@given(names, *sizes.values())
def test_nobody_waits_for_ever(name, ranks, micro_batches, chunks):
    """Even if every send is synchronous, for training and for the forward passes alone."""
    of_ranks, chunks = lists(name, ranks, micro_batches, chunks)
    play(of_ranks, Cost(), chunks=chunks)
    play([[action for action in actions if action.kind is Kind.FORWARD] for actions in of_ranks], Cost(), chunks=chunks)


@given(names, *sizes.values())
def test_a_pass_comes_after_what_it_needs(name, ranks, micro_batches, chunks):
    """In the simulation: forward after the stage before, backward after the stage behind, weights after inputs."""
    of_ranks, chunks = lists(name, ranks, micro_batches, chunks)
    when = {(action.chunk * ranks + rank, action.kind, action.micro_batch): (start, end)
            for rank, passes in enumerate(play(of_ranks, Cost(), chunks=chunks).ranks) for start, end, action in passes}
    for (stage, kind, number), (start, _) in when.items():
        before = {Kind.FORWARD: [(stage - 1, kind)], Kind.BACKWARD: [(stage + 1, kind), (stage, Kind.FORWARD)],
                  Kind.INPUT: [(stage + 1, kind), (stage, Kind.FORWARD)], Kind.WEIGHT: [(stage, Kind.INPUT)]}[kind]
        for other, earlier in before:
            if 0 <= other < ranks * chunks:
                assert when[other, earlier, number][1] <= start


@given(st.integers(1, 8), st.integers(1, 20))
def test_how_many_activations_are_kept(ranks, micro_batches):
    """GPipe keeps all; 1F1B what is needed to reach the last stage; ZB-H1 no more than 1F1B's first stage."""
    kept = {name: [play(lists(name, ranks, micro_batches)[0], Cost()).in_flight(rank) for rank in range(ranks)]
            for name in ("gpipe", "1f1b", "zb")}
    assert kept["gpipe"] == [micro_batches] * ranks
    assert kept["1f1b"] == [min(micro_batches, ranks - rank) for rank in range(ranks)]
    assert max(kept["zb"]) <= min(micro_batches, ranks)


@given(st.integers(2, 8), st.integers(0, 16), st.integers(1, 5), st.integers(1, 5))
def test_bubbles_are_those_of_the_papers(ranks, more, forward, backward):
    """(p - 1) (F + I + W) for GPipe and 1F1B; (p - 1) (F + I - W) for ZB-H1 where all are alike."""
    micro_batches = ranks + more
    cost = Cost(forward, backward, backward)
    for name in ("gpipe", "1f1b"):
        bubble = play(lists(name, ranks, micro_batches)[0], cost).bubble
        assert bubble == pytest.approx((ranks - 1) * (forward + 2 * backward))
    zero, plain = (play(lists(name, ranks, micro_batches)[0], cost).bubble for name in ("zb", "1f1b"))
    assert zero < plain
    assert play(lists("zb", ranks, micro_batches)[0], Cost()).bubble == pytest.approx(ranks - 1)


@given(st.integers(2, 6), st.integers(1, 4), st.integers(1, 4))
def test_chunks_divide_the_bubble(ranks, rounds, chunks):
    """Interleaved: by their number, when whole rounds fill the ranks."""
    of_ranks, _ = lists("interleaved", ranks, ranks * rounds, chunks)
    cost = Cost(1 / chunks, 1 / chunks, 1 / chunks)
    assert play(of_ranks, cost, chunks=chunks).bubble == pytest.approx(3 * (ranks - 1) / chunks)


@every_schedule
def test_one_rank_has_no_bubble(name):
    """There is nobody to wait for."""
    of_ranks, chunks = lists(name, 1, 5, 3)
    assert play(of_ranks, Cost(), chunks=chunks).bubble == pytest.approx(0)


def test_on_one_rank_it_is_gradient_accumulation():
    """The default schedule, forward and backward in turn."""
    assert " ".join(map(str, lists("1f1b", 1, 3)[0][0])) == "F0 B0 F1 B1 F2 B2"


def test_the_picture_of_the_zero_bubble_paper():
    """The last of four stages puts weights off; the first does them at once."""
    first, *_, last = (" ".join(map(str, actions)) for actions in lists("zb", 4, 5)[0])
    assert first == "F0 F1 F2 F3 I0 W0 F4 I1 W1 I2 W2 I3 W3 I4 W4"
    assert last == "F0 I0 F1 I1 F2 I2 F3 I3 W0 F4 I4 W1 W2 W3 W4"


def test_the_simulation_sees_a_deadlock():
    """Two ranks that each wait for the other first, and a message that nobody takes."""
    forward, backward = Action(Kind.FORWARD, 0), Action(Kind.BACKWARD, 0)
    with pytest.raises(DeadlockError, match="rank 0 at B0, rank 1 at F0"):
        play([[backward, forward], [forward, backward]], Cost())
    with pytest.raises(DeadlockError, match="nobody receives"):
        play([[forward], []], Cost())


def test_an_unknown_schedule_is_named():
    """With those there are."""
    with pytest.raises(UserError, match=r"1f2b.*1f1b"):
        schedules.get("1f2b")
