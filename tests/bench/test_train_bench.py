"""The training benchmark for real, on a model of a few thousand parameters."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch

from mpilm.bench import _contenders
from mpilm.bench._contenders import CASES, _llama, mpilm
from mpilm.bench._jobs import Job, JobError
from mpilm.model.precision import DTYPES
from tests.helpers import run_nested

WHO = ["mpilm-reproducible", "single"]     # peers of several processes train in test_peers.py


@pytest.mark.serial
@pytest.mark.slow
def test_contenders_take_turns_and_json_has_an_object_a_line():
    result = run_nested(2, ["-m", "mpilm.bench", "train", "--json", "--case", "tiny", "--who", ",".join(WHO),
                            "--rounds", "2", "--steps", "1", "--precision", "fp32"], timeout=280)
    assert result.rc == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert all(list(line) == ["bench", "case", "who", "value", "unit"] for line in lines)
    assert {line["bench"] for line in lines} == {"train"}
    assert [line["who"] for line in lines if (line["case"], line["unit"]) == ("tiny", "tokens/s")] == WHO, result.stderr
    assert [line["who"] for line in lines if (line["case"], line["unit"]) == ("tiny peak PSS", "MiB")] == WHO
    assert [line["who"] for line in lines if (line["case"], line["unit"]) == ("tiny peak RSS", "MiB")] == WHO
    assert all(line["value"] > 0 for line in lines)
    assert "group 1, round 2 of 2, tokens/s: single" in result.stderr


@pytest.mark.serial
def test_a_contender_that_fails_tells_why():
    odd = replace(CASES["tiny"], precision="bf17")
    with pytest.raises(JobError, match=r"mpilm ended.*\n[\s\S]*bf17"), \
         Job(_contenders.parse("mpilm"), odd, cores=range(os.cpu_count() or 1), size=1):
        pass


@pytest.mark.serial
def test_a_contender_that_is_killed_is_an_error():
    with Job(_contenders.parse("mpilm"), CASES["tiny"], cores=range(os.cpu_count() or 1), size=1) as job:
        assert job.run(steps=2) > 0
        os.kill(job.pids[0], signal.SIGKILL)
        for _ in range(2):
            with pytest.raises(JobError, match="mpilm ended"):
                job.run(steps=1)


@pytest.mark.serial
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_all_compute_in_the_same_precision(precision):
    """Who may choose for himself wins where the others' is slow."""
    case = replace(CASES["tiny"], precision=precision)
    assert mpilm.configuration(case, reproducible=True, micro_batches=4).run.precision == precision
    with _llama.autocast(case):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == DTYPES[precision]


@pytest.mark.serial
@pytest.mark.parametrize(("option", "value"), [("--who", "horovod"), ("--case", "huge")])
def test_a_name_that_is_none_is_a_users_mistake(option, value):
    result = run_nested(2, ["-m", "mpilm.bench", "train", option, value])
    assert result.rc == 2
    assert f"{option} {value}: there is no such" in result.stderr
    assert "Traceback" not in result.stderr
