"""Peers of several processes train: steps of each on the test's own two ranks, over Gloo."""

from __future__ import annotations

import math

import pytest

from mpilm.bench import _contenders, _pipelines, _shardings, _tensors
from mpilm.bench._contenders import CASES, Place
from tests.helpers import everywhere

TINY = CASES["tiny"]


@pytest.mark.slow
@pytest.mark.ranks(min=2, max=2)
@pytest.mark.filterwarnings("ignore")     # transformers' own
@pytest.mark.parametrize(("menu", "name"), [
    (_contenders.parse, "ddp"), (_contenders.parse, "fsdp2"), (_shardings.who, "fsdp2-kept"),
    (_tensors.who, "torch-tp"), (_pipelines.who, "torch-1f1b"), (_pipelines.who, "torch-1f1b-ours-eager"),
])
def test_they_begin_where_nothing_is_known(menu, name, comm, tmp_path_all, monkeypatch):
    """All tokens are as likely, to a model that has learned nothing; of stages only the last knows a loss."""
    who = menu(name)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "")     # which a peer sets; put back
    place = Place(comm.rank, comm.size, (0, ), str(tmp_path_all / "rendezvous"), who.variants)
    with who.load().contender(TINY, place) as step:
        losses = [step() for _ in range(2)]
    knows = not name.startswith("torch-1f1b") or comm.rank == comm.size - 1
    everywhere(comm, all(abs(loss - knows * math.log(TINY.vocab_size)) < 1 for loss in losses), str(losses))
