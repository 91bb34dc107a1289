"""Impossible layouts are refused with those that would work, before anything is built."""

from __future__ import annotations

import pytest

from mpilm.config import Config, Data, Model, Parallel, Run
from mpilm.log import UserError
from mpilm.model.shape import Shape
from mpilm.parallel import layout

pytestmark = pytest.mark.serial


def check(ranks, *, layers=6, tied=False, kv_heads=4, vocab_size=500, slots=8, reproducible=True, **parallel):
    """What `layout.check` says of it."""
    shape = Shape(layers=layers, width=64, heads=4, kv_heads=kv_heads, hidden=256, vocab_size=vocab_size,
                  tied_embeddings=tied)
    config = Config(run=Run(reproducible=reproducible), model=Model(layers=layers, tied_embeddings=tied),
                    data=Data(global_batch_size=slots, micro_batch_size=1), parallel=Parallel(**parallel))
    layout.check(config, shape, ranks)
    return layout.stages(config, shape)


@pytest.mark.parametrize(("ranks", "options", "said"), [
    (8, {"pp": 3}, "pipelines of 3. With 8 ranks and these options --parallel.pp may be 1, 2, 4 or 8."),
    (2, {"pp": 4}, "may be 1 or 2."),
    (12, {"pp": 12}, "the model has 8 pieces .* may be 2, 3, 4 or 6."),
    (4, {"pp": 4, "schedule": "interleaved", "chunks": 3}, "12 stages are wanted. .* may be 1 or 2."),
    (4, {"pp": 2, "tied": True}, "tied_embeddings true .* may be 1."),
    (16, {"pp": 1}, "must be a power of two, 16 or more, and it is 8.* --parallel.pp may be 2, 4 or 8"),
    (5, {"pp": 1, "slots": 2, "reproducible": False}, "5 replicas .* may be 5"),
    (4, {"pp": 2, "slots": 6}, "power of two"),
    (2, {"pp": 2, "schedule": "1f2b"}, "1f2b.*gpipe, 1f1b, interleaved, zb"),
    (2, {"pp": 2, "split": "6"}, "blocks of each of the 2 stages, such as 3,3"),
    (2, {"pp": 2, "split": "a,b"}, "such as 3,3"),
    (2, {"pp": 2, "split": "3,4"}, "deals 7 blocks"),
    (2, {"tp": 2, "vocab_size": 501}, "vocab_size 501 is no multiple of 2; 502 is. .* --parallel.tp may be 1."),
    (8, {"tp": 4, "kv_heads": 2}, "kv_heads 2 is no multiple of 4; 4 is. .* --parallel.tp may be 1 or 2."),
    (8, {"tp": 8}, "heads 4 is no multiple of 8; 8 is. .* --parallel.tp may be 1, 2 or 4."),
    (6, {"tp": 3, "slots": 6, "reproducible": False}, "heads 4 is no multiple of 3; 6 is. .*tp may be 1 or 2."),
    (4, {"cp": 3}, "1 x 3 x 1 .* --parallel.cp may be 1, 2 or 4."),
    (6, {"cp": 3, "slots": 6, "reproducible": False}, "length 256 is no multiple of 6; 258 is. .*cp may be 1 or 2."),
    (8, {"cp": 2, "pp": 8}, "8 x 2 x 1"),
])
def test_what_cannot_work_is_refused_with_what_would(ranks, options, said):
    """In one message."""
    with pytest.raises(UserError, match=said):
        check(ranks, **options)


@pytest.mark.parametrize(("ranks", "options"), [
    (1, {"tied": True}), (8, {"pp": 8}), (8, {"pp": 4, "schedule": "zb"}), (3, {"pp": 3}),
    (4, {"pp": 4, "schedule": "interleaved", "chunks": 2}), (2, {"pp": 2, "split": "2, 4"}),
    (8, {"cp": 4}), (8, {"cp": 2, "pp": 2}), (2, {"cp": 2, "tied": True}),
    (2, {"tp": 2, "tied": True}), (8, {"pp": 2, "cp": 2, "tp": 2}),
    (6, {"pp": 2, "slots": 6, "reproducible": False}),
])
def test_what_works_gives_every_unit_to_one_stage(ranks, options):
    """Embedding, six blocks, head."""
    assert [unit for run in check(ranks, **options) for unit in run] == list(range(8))


def test_a_rank_has_every_so_manieth_stage():
    """Chunks go round the ranks."""
    assert layout.of_rank([range(2), range(2, 4), range(4, 6), range(6, 8)], 1, 2) == [range(2, 4), range(6, 8)]
