"""The pipeline benchmark for real, on a model of a few thousand parameters."""

from __future__ import annotations

import importlib
import json

import pytest

from mpilm.bench import _pipelines
from mpilm.log import UserError
from tests.helpers import run_nested

pytestmark = pytest.mark.serial
WHO = ["mpilm-zb"]     # its peers train in test_peers.py
ASLEEP = [f"mpilm-{name}" for name in _pipelines.ASLEEP]


@pytest.mark.slow
def test_contenders_take_turns_and_bubbles_are_told():
    """Of each stage; and of three stages that sleep."""
    result = run_nested(2, ["-m", "mpilm.bench", "pipeline", "--json", "--case", "tiny", "--who", ",".join(WHO),
                            "--emulated", "3", "--rounds", "1", "--steps", "1"], timeout=280)
    assert result.rc == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    found = {}
    for line in lines:
        assert line["bench"] == "pipeline" and line["value"] > 0
        found.setdefault(line["case"], {})[line["who"]] = line["value"]
    assert list(found["tiny"]) == WHO, result.stderr
    for stage in (0, 1):
        assert list(found[f"tiny bubble of stage {stage}"]) == ["mpilm-zb", "formula"]
    assert found["tiny bubble of stage 1"]["formula"] == 20      # one of five
    assert list(found["tiny emulated on 3 stages: passes"]) == ASLEEP
    bubbles = found["tiny emulated on 3 stages: bubble"]
    assert set(bubbles) == {*ASLEEP, *(f"{name} simulated" for name in _pipelines.ASLEEP), "formula"}
    assert bubbles["zb simulated"] < bubbles["1f1b simulated"]
    assert all(value < 100 for value in bubbles.values())


@pytest.mark.parametrize("file", ["mpilm", "torch", "emulated"])
def test_every_file_keeps_to_the_interface(file):
    """That of `_contenders`."""
    module = importlib.import_module(f"mpilm.bench._pipelines.{file}")
    assert module.LAYOUT in {"peers", "mpi"} and callable(module.contender)


def test_names_are_those_people_ask_for():
    """Taken apart, and refused with those there are."""
    names = _pipelines.names()
    assert set(_pipelines.MEASURED) <= set(names) and len(set(names)) == len(names)
    assert {"mpilm-1f1b", "mpilm-zb", "mpilm-gpipe", "mpilm-interleaved", "mpilm-dp", "torch-1f1b"} <= set(names)
    found = _pipelines.who("torch-1f1b-ours-eager-tuned")
    assert (found.file, found.variants, found.tuned, found.ours) == ("torch", {"1f1b", "ours", "eager"}, True, False)
    with pytest.raises(UserError, match="there are mpilm-1f1b, "):
        _pipelines.who("gpipe")
