"""The benchmark of memory: names of layouts, and a run on models of a few thousand parameters."""

from __future__ import annotations

import json

import pytest

from mpilm.bench import _layouts, memory
from mpilm.bench._contenders import CASES
from mpilm.log import UserError
from tests.helpers import run_nested

pytestmark = pytest.mark.serial
WHO = ["whole"]     # jobs of several ranks: test_sharded_bench.py


def test_a_name_says_what_is_split():
    who = _layouts.who("pp2-tp4-zb-recompute")
    config = _layouts.configuration(CASES["deep"], who.variants)
    assert _layouts.size(who) == 8
    assert (config.parallel.pp, config.parallel.tp, config.parallel.cp) == (2, 4, 1)
    assert (config.parallel.schedule, config.parallel.recompute, config.sync.kind) == ("zb", True, "allreduce")
    divided = _layouts.configuration(CASES["deep"], _layouts.who("dp4-level3-ring").variants).sync
    assert (divided.kind, divided.level, divided.collective) == ("sharded", 3, "ring")


@pytest.mark.parametrize("name", ["", "pp", "pp2-level4", "dp0", "whole-quick"])
def test_unknown_words_are_refused(name):
    with pytest.raises(UserError, match="a layout is made of dp, pp, cp, tp"):
        _layouts.who(name)


def test_predictions_fall_with_ranks():
    """Of those that are measured; the figures in the README are of `deep`."""
    deep = CASES["deep"]
    totals = {name: memory.predicted(deep, _layouts.who(name)) for name in _layouts.MEASURED}
    assert totals["whole"] > totals["pp2"] > totals["pp4"]
    assert totals["whole"] > totals["tp2"] > totals["tp4"]
    assert totals["dp4-level1-ring"] > totals["dp4-level2-ring"] > totals["dp4-level3-ring"]


@pytest.mark.slow
def test_json_has_an_object_a_line():
    result = run_nested(2, ["-m", "mpilm.bench", "memory", "--json", "--case", "tiny", "--who", ",".join(WHO)],
                        timeout=280)
    assert result.rc == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["bench"] for line in lines} == {"memory"}
    for case, unit in (("tiny predicted", "MiB"), ("tiny measured", "MiB"), ("tiny predicted / measured - 1", "%")):
        assert [line["who"] for line in lines if (line["case"], line["unit"]) == (case, unit)] == WHO, result.stderr
