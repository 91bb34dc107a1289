"""The benchmark of divided memory: its menu, and a run on a model of a few thousand parameters."""

import json

import pytest

from mpilm.bench import _shardings
from mpilm.bench._contenders import CASES, Place
from mpilm.bench._shardings import mpilm
from mpilm.log import UserError
from tests.helpers import run_nested

WHO = ["mpilm-sharded3-ring"]     # its peers train in test_peers.py


def test_names_are_those_people_ask_for():
    assert {"mpilm-allreduce", "mpilm-sharded1", "mpilm-sharded3", "fsdp2"} <= set(_shardings.MEASURED)
    assert set(_shardings.MEASURED) <= set(_shardings.names())
    for name in _shardings.names():
        who = _shardings.who(name)
        assert ("mpi" if name.startswith("mpilm") else "peers") == who.load().LAYOUT
    with pytest.raises(UserError, match="there are mpilm-allreduce"):
        _shardings.who("mpilm-sharded4")


def test_a_name_says_how_memory_is_divided():
    kinds = {}
    for name in ("mpilm-allreduce", "mpilm-sharded2", "mpilm-sharded3-ring"):
        place = Place(0, 2, (0,), "", _shardings.who(name).variants)
        sync = mpilm.configuration(CASES["tiny"], place).sync
        kinds[name] = sync.kind, sync.level, sync.collective
    assert list(kinds.values()) == [("allreduce", 1, "auto"), ("sharded", 2, "auto"), ("sharded", 3, "ring")]


@pytest.mark.serial
@pytest.mark.slow
def test_json_has_an_object_a_line():
    result = run_nested(2, ["-m", "mpilm.bench", "sharded", "--json", "--case", "tiny", "--who", ",".join(WHO),
                            "--rounds", "1", "--steps", "1"], timeout=280)
    assert result.rc == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert {line["bench"] for line in lines} == {"sharded"}
    for case, unit in (("tiny", "tokens/s"), ("tiny peak PSS", "MiB"), ("tiny peak RSS", "MiB")):
        assert [line["who"] for line in lines if (line["case"], line["unit"]) == (case, unit)] == WHO, result.stderr
    assert all(line["value"] > 0 for line in lines)
