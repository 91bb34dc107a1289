"""A job whose ranks share sequences: training, documents, validation and the sample, beside the job of one rank."""

from __future__ import annotations

import json

import pytest

from tests import datasets

OPTIONS = {"run.steps": 3, "run.precision": "fp32", "run.compile": "off", "data.sequence_length": 64,
           "data.global_batch_size": 8, "data.micro_batch_size": 2, "data.mask_documents": "true", "model.layers": 2,
           "model.width": 64, "model.heads": 2, "optim.eps": 1e-3, "log.every": 1, "log.validate_every": 3,
           "log.validation_sequences": 8, "log.tensorboard": "false"}


@pytest.mark.serial
@pytest.mark.slow
def test_a_job_of_4_ranks_is_the_job_of_one(run_mpi, tmp_path):
    """Two stages whose ranks share sequences in pairs: losses, norms and validation to 1e-5."""
    data = datasets.small(tmp_path / "data")
    courses = {}
    for name, ranks, cp, pp in [("one", 1, 1, 1), ("all", 4, 2, 2)]:
        directory = tmp_path / name
        options = OPTIONS | {"data.path": data, "run.dir": directory, "parallel.cp": cp, "parallel.pp": pp}
        result = run_mpi(ranks, ["-m", "mpilm.train", *(text for key, value in options.items()
                                                        for text in (f"--{key}", str(value)))])
        assert result.rc == 0, result.stdout + result.stderr
        assert "the model writes:" in result.stdout + result.stderr
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        courses[name] = [line[key] for line in lines for key in ("loss", "grad_norm")] + [lines[-1]["validation_loss"]]
    assert courses["all"] == pytest.approx(courses["one"], rel=1e-5)
