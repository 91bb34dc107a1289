"""The benchmark of shared layers: its menu, and a run on a model of a few thousand parameters."""

from __future__ import annotations

import json

import pytest

from mpilm.bench import _tensors
from mpilm.bench._contenders import CASES, Place
from mpilm.bench._tensors import mpilm
from mpilm.log import UserError
from tests.helpers import run_nested

pytestmark = pytest.mark.serial
WHO = ["mpilm-tp"]     # its peers train in test_peers.py


def test_names_are_those_people_ask_for():
    assert {"mpilm-tp", "mpilm-dp", "torch-tp", "torch-tp-tuned"} <= set(_tensors.MEASURED) <= set(_tensors.names())
    for name in _tensors.names():
        who = _tensors.who(name)
        assert ("mpi" if name.startswith("mpilm") else "peers") == who.load().LAYOUT
    with pytest.raises(UserError, match="there are mpilm-tp"):
        _tensors.who("mpilm-pp")


@pytest.mark.parametrize(("name", "tp", "micro_batch_size"), [("mpilm-tp", 2, 4), ("mpilm-dp", 1, 2)])
def test_a_name_says_what_is_shared(name, tp, micro_batch_size):
    config = mpilm.configuration(CASES["tiny"], Place(0, 2, (0,), "", _tensors.who(name).variants))
    assert (config.parallel.tp, config.data.micro_batch_size) == (tp, micro_batch_size)


@pytest.mark.slow
def test_json_has_an_object_a_line():
    result = run_nested(2, ["-m", "mpilm.bench", "tensor", "--json", "--case", "tiny", "--who", ",".join(WHO),
                            "--rounds", "1", "--steps", "1"], timeout=280)
    assert result.rc == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["bench"] for line in lines} == {"tensor"}
    for case, unit in (("tiny", "tokens/s"), ("tiny peak PSS", "MiB"), ("tiny peak RSS", "MiB")):
        assert [line["who"] for line in lines if (line["case"], line["unit"]) == (case, unit)] == WHO, result.stderr
    assert all(line["value"] > 0 for line in lines)
