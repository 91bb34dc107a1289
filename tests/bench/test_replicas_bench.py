"""The benchmarks of ways to keep replicas together: their menu, and runs that say nothing about speed."""

from __future__ import annotations

import math

import pytest

from mpilm import options
from mpilm.bench import _replicas, quality, slow
from mpilm.bench._replicas import Size
from mpilm.log import UserError
from tests import datasets

TINY = Size(layers=1, width=32, sequence_length=16, sequences=4)


@pytest.fixture
def data(comm, tmp_path_all, monkeypatch):
    """A small dataset in place of the built-in corpus, and small models."""
    path = str(datasets.for_all(comm, tmp_path_all / "data"))
    for module in (quality, slow):
        monkeypatch.setattr(module, "built_in", lambda world: path)
    monkeypatch.setattr(quality, "SMALL", TINY)
    monkeypatch.setattr(slow, "LARGE", TINY)


@pytest.mark.serial
def test_all_runs_are_ones_that_train_would_do():
    """And all ways under all kinds that take them."""
    for name in _replicas.names():
        options.check(_replicas.configuration(name, TINY, "", steps=64))
    assert len(_replicas.names()) == 4 * 6 - 1 + len(_replicas.MORE)
    assert _replicas.chosen("local_sgd,allreduce") == ["allreduce", "local_sgd"]
    with pytest.raises(UserError, match="there are allreduce, allreduce-bf16"):
        _replicas.chosen("server-powersgd")


@pytest.mark.slow
@pytest.mark.ranks(min=2)
def test_quality_has_a_line_for_all(comm, data):
    """Losses are those of real runs; what is sent is what was to be."""
    figures = {}
    text = quality.run(comm, lambda case, who, value, unit: figures.setdefault(case, {}).update({who: value}),
                       who="allreduce-int8,local_sgd,server,server_inf", steps=16)
    assert list(figures["loss"]) == ["allreduce", "allreduce-int8", "local_sgd", "server", "server_inf"]
    assert all(math.isfinite(value) for value in figures["loss"].values())
    assert abs(figures["loss"]["allreduce-int8"] - figures["loss"]["allreduce"]) < 0.05
    sent = figures["sent"]
    assert 0 < sent["allreduce-int8"] < sent["allreduce"] / 3, "a quarter, and nothing of what lies between parameters"
    assert sent["local_sgd"] < sent["allreduce"] / 10, "16 steps are no round"
    assert len(text.splitlines()) == 7


@pytest.mark.slow
def test_slow_has_figures_for_all(comm, data):
    """Over a line that is fast."""
    figures = []
    slow.run(comm, lambda *figure: figures.append(figure), who="allreduce-topk,local_sgd", steps=96, rounds=1,
             mbit_s=10_000, latency_ms=1)
    assert {(case, who, unit) for case, who, _, unit in figures} == {
        (case, who, unit) for who in ("allreduce", "allreduce-topk", "local_sgd") for case, unit in
        (("10000 Mbit/s", "tokens/s"), ("sent", "MiB a step"), ("after 6,144 tokens", "nats a token"))}
    assert all(value > 0 for *_, value, _ in figures)


@pytest.mark.serial
@pytest.mark.parametrize(("given", "words"), [
    ({"who": "server"}, "bench quality"), ({"who": "hope"}, "there are allreduce"), ({"steps": 64, "rounds": 3}, "160"),
])
def test_what_cannot_be_compared_is_refused(given, words, comm):
    """With what would do."""
    default = {"who": "local_sgd", "steps": 160, "rounds": 3, "mbit_s": 100, "latency_ms": 1}
    with pytest.raises(UserError, match=words):
        slow.run(comm, lambda *_: None, **default | given)
