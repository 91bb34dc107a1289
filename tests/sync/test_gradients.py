"""What a bucket makes of gradients: sparse ones as dense ones, and the same sums of squares however they are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.comm.devices import HOST
from mpilm.comm.order import BLOCK, tree
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape
from mpilm.sync._buckets import Segment
from mpilm.sync._gradients import Whole, count
from mpilm.sync._layout import Layout, Member
from mpilm.sync._slots import num_buffers, running_visits, tree_visits

pytestmark = pytest.mark.serial
VOCAB, WIDTH = 50, 8


def table_gradient(tokens, upstream, *, sparse):
    """Of an embedding in bf16, whose rows get the gradients `upstream`."""
    table = torch.zeros(VOCAB, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    torch.nn.functional.embedding(tokens, table, sparse=sparse).backward(upstream)
    return table.grad


def rounded(tokens, upstream):
    """The same in float32, a token after the other, and then in bf16."""
    total = torch.zeros(VOCAB, WIDTH)
    for token, row in zip(tokens.flatten().tolist(), upstream.flatten(0, -2).float(), strict=True):
        total[token] += row
    return total.bfloat16().float()


@settings(max_examples=25)
@given(slots=st.sampled_from([1, 2, 4, 8]), length=st.integers(1, 40), words=st.integers(1, VOCAB),
       seed=st.integers(0, 99))
def test_sparse_gradients_are_summed_as_dense_ones_along_the_tree(slots, length, words, seed):
    """To the bit: each slot for itself in float32, and rounded; then slots by the tree, whichever of them have a word.
    """
    draw = torch.Generator().manual_seed(seed)
    given_to = [(torch.randint(words, (2, length), generator=draw),
                 torch.randn(2, length, WIDTH, generator=draw).bfloat16()) for _ in range(slots)]
    visits = tree_visits(slots)
    buffers = [torch.full((VOCAB * WIDTH,), torch.nan) for _ in range(num_buffers(visits))]
    for visit, (tokens, upstream) in zip(visits, given_to, strict=True):
        count(buffers, slice(None), visit, table_gradient(tokens, upstream, sparse=True))
    sums = [rounded(tokens, upstream) for tokens, upstream in given_to]
    for into, other in tree(slots):
        sums[into] += sums[other]
    assert sums[0].abs().sum() > 0
    assert torch.equal(buffers[0].view(VOCAB, WIDTH), sums[0])


def test_a_parameter_without_a_gradient_and_one_with_a_dense_one_after_a_sparse_one():
    """Fast mode adds as slots come, whatever kind they are."""
    draw = torch.Generator().manual_seed(3)
    tokens, upstream = torch.randint(VOCAB, (9,), generator=draw), torch.randn(9, WIDTH, generator=draw).bfloat16()
    dense = torch.randn(VOCAB, WIDTH, generator=draw)
    buffer = torch.full((VOCAB * WIDTH,), torch.nan)
    for visit, gradient in zip(running_visits(4), (None, table_gradient(tokens, upstream, sparse=True), dense, None),
                               strict=True):
        count([buffer], slice(None), visit, gradient)
    assert torch.equal(buffer.view(VOCAB, WIDTH), rounded(tokens, upstream) + dense)


def test_threads_change_no_bit_of_a_sparse_gradient():
    """However many rows a word has, and however long they are."""
    draw = torch.Generator().manual_seed(4)
    values, before = torch.randn(2048, 4096, generator=draw).bfloat16(), torch.get_num_threads()
    gradient = torch.sparse_coo_tensor(torch.randint(3, (1, len(values)), generator=draw), values, (3, values.shape[1]),
                                       check_invariants=True)
    found = []
    try:
        for threads in (1, 4):
            torch.set_num_threads(threads)
            buffer = torch.zeros(gradient.numel())
            count([buffer], slice(None), running_visits(1)[0], gradient)
            found.append(buffer)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_gives_sparse_gradients_to_a_synchronizer_only(tied):
    """Not to a plain loop, whose optimizer may not take them; and a head's gradient is not sparse."""
    model = GPT(Shape(layers=1, width=16, heads=2, vocab_size=VOCAB, tied_embeddings=tied))
    model.initialize(seed=1)
    tokens = torch.randint(VOCAB, (2, 8), generator=torch.Generator().manual_seed(1))
    model(tokens, tokens).backward()
    plain, model.embed_tokens.weight.grad = model.embed_tokens.weight.grad, None
    assert not plain.is_sparse
    model.expect(1)
    model(tokens, tokens).backward()
    assert model.embed_tokens.weight.grad.is_sparse != tied
    torch.testing.assert_close(model.embed_tokens.weight.grad.to_dense(), plain)


class Told(Whole):
    """Gradients that nobody else has a share in."""

    def __init__(self, layout, own):
        super().__init__(layout, np.zeros, lambda buffer, then: then(slice(0, len(buffer))), own, running_visits(1))


def squares(values, layout, own, parts, repeated=()):
    """Of my segment `own` of a bucket with these values, told in `parts`."""
    segment = Segment(layout, own, repeated)
    segment.gradients, segment.squares = Told(layout, own), np.full((own.stop - own.start) // BLOCK, np.nan)
    segment.gradients.reduced[:] = values
    for part in parts:
        segment.square(part)
    return segment.squares


@settings(max_examples=20)
@given(blocks=st.integers(1, 9), data=st.data())
def test_a_block_has_the_same_sum_of_squares_however_parts_are_cut(blocks, data):
    """To the bit, and nearly that of float64; parts that reach beyond my segment count as far as it goes."""
    start = data.draw(st.integers(0, blocks - 1))
    stop = data.draw(st.integers(start + 1, blocks))
    cuts = [*sorted(data.draw(st.sets(st.integers(0, blocks)))), blocks]
    layout = Layout((Member("w", 0, blocks * BLOCK - 5),), blocks * BLOCK, blocks * BLOCK)
    values = np.random.default_rng(blocks).standard_normal(blocks * BLOCK).astype(np.float32)
    own = slice(start * BLOCK, stop * BLOCK)
    parts = [slice(low * BLOCK, high * BLOCK) for low, high in zip([0, *cuts[:-1]], cuts, strict=True)]
    found = squares(values, layout, own, parts)
    alone = [squares(values[block * BLOCK:][:BLOCK], Layout((), BLOCK, BLOCK), slice(0, BLOCK), [slice(0, BLOCK)])[0]
             for block in range(start, stop)]
    assert found.tolist() == alone
    wide = values[own].astype(np.float64).reshape(-1, BLOCK)
    np.testing.assert_allclose(found, (wide ** 2).sum(1), rtol=1e-6)


@pytest.mark.parametrize("value", [1e25, np.inf, np.nan])
def test_a_norm_that_is_not_finite_is_told_by_who_reads_it(value):
    """Without a warning of NumPy's, on every rank, and only in its own block."""
    values = np.ones(3 * BLOCK, np.float32)
    values[BLOCK + 7] = value
    found = np.zeros(3)
    HOST.squares(values, found)
    assert np.isfinite(found).tolist() == [True, False, True]


def test_what_another_rank_counts_is_zero():
    """Blocks of a repeated member, wherever parts are cut."""
    layout = Layout((Member("a", 0, 2 * BLOCK), Member("b", 2 * BLOCK, 7), Member("c", 3 * BLOCK, BLOCK)), 4 * BLOCK,
                    4 * BLOCK)
    values, own = np.ones(4 * BLOCK, np.float32), slice(BLOCK, 4 * BLOCK)
    for cut in (2, 3):
        parts = [slice(0, cut * BLOCK), slice(cut * BLOCK, 4 * BLOCK)]
        assert squares(values, layout, own, parts, repeated={"b"}).tolist() == [BLOCK, 0, BLOCK]
