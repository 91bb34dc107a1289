"""The same bits on any layout, stopped or not: real jobs of `python -m mpilm.train`, compared to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest

from mpilm import inspect
from tests import datasets

STEPS = 6
OPTIONS = {"run.steps": STEPS, "run.compile": "off", "data.sequence_length": 32, "data.global_batch_size": 8,
           "data.micro_batch_size": 2, "model.layers": 2, "model.width": 64, "model.heads": 2, "optim.warmup_steps": 2,
           "log.every": 1, "log.validate_every": 3, "log.validation_sequences": 8, "log.tensorboard": "false",
           "checkpoint.every": 2, "checkpoint.keep_last": 9}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One small dataset for all runs."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(run_mpi, data):
    """train(ranks, directory, **options) -> what metrics.jsonl and the final checkpoint say."""
    def run(ranks, directory, env=None, says="", **changes):
        options = OPTIONS | {"data.path": data, "run.dir": directory} | changes
        args = [text for key, value in options.items() for text in (f"--{key}", str(value))]
        result = run_mpi(ranks, ["-m", "mpilm.train", *args], env=env)
        assert result.rc == 0, result.stdout + result.stderr
        assert says in result.stdout + result.stderr
        lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
        courses = [(line["step"], line["loss"], line["grad_norm"], line.get("validation_loss")) for line in lines]
        return courses, inspect.describe(inspect.find(directory))["weights_sha256"]
    return run


@pytest.mark.serial
@pytest.mark.slow
def test_any_layout_gives_the_same_bits(train, tmp_path):
    """1, 2, 3 and 4 ranks; shared and tree; buckets of any size."""
    alone = train(1, tmp_path / "one")
    assert len(alone[0]) == STEPS
    layouts = [(2, {"sync.collective": "tree", "sync.bucket_mib": 0.05}), (3, {"sync.bucket_mib": 64}),
               (4, {"sync.collective": "shared", "sync.bucket_mib": 0.1})]
    for number, (ranks, options) in enumerate(layouts):
        assert train(ranks, tmp_path / str(number), **options) == alone, (ranks, options)


@pytest.mark.serial
@pytest.mark.slow
def test_any_pipeline_gives_the_same_bits(train, tmp_path):
    """Replicas times stages, every schedule; four stages have one unit each: embedding, block, block, head.

    Every combination is in test_contract.py; these are whole jobs, with validation and documents."""
    short = {"run.steps": 3, "checkpoint.every": 0, "run.precision": "bf16", "data.mask_documents": "true"}
    alone = train(1, tmp_path / "one", **short)
    layouts = [(3, 3, "1f1b"), (4, 2, "interleaved"), (4, 4, "zb")]
    for ranks, pp, schedule in layouts:
        options = {"parallel.pp": pp, "parallel.schedule": schedule} | short
        assert train(ranks, tmp_path / f"{ranks}-{pp}-{schedule}", **options) == alone, (ranks, pp, schedule)


@pytest.mark.serial
@pytest.mark.slow
def test_stopping_and_resuming_as_another_pipeline_gives_the_same_bits(train, run_mpi, tmp_path):
    """Two steps on one rank, two as two replicas of two stages, two as three stages; then it is evaluated."""
    whole = {"run.precision": "fp32"}
    undisturbed = train(1, tmp_path / "whole", **whole)
    pieces = tmp_path / "pieces"
    for ranks, pp, stop in [(1, 1, 2), (4, 2, 4), (3, 3, STEPS)]:
        course = train(ranks, pieces, **whole, **{"parallel.pp": pp})
        for step in range(stop + 1, STEPS + 1):
            shutil.rmtree(pieces / "checkpoints" / f"step-{step:08}", ignore_errors=True)
    assert course == undisturbed
    told = [run_mpi(ranks, ["-m", "mpilm.evaluate", str(pieces), "--sequences", "8"]).stdout for ranks in (1, 2)]
    assert told[0] == told[1] and f"validation loss {undisturbed[0][-1][3]:.4f}" in told[0], told


@pytest.mark.serial
@pytest.mark.slow
def test_stopping_and_resuming_with_memory_divided_otherwise_gives_the_same_bits(train, tmp_path):
    """Two steps on two replicas of two stages at level 2, the rest on two ranks at level 3, which gather weights for
    the validation too."""
    exact = {"run.precision": "fp32"}
    undisturbed = train(1, tmp_path / "whole", **exact)
    pieces = tmp_path / "pieces"
    sharded = exact | {"sync.kind": "sharded", "sync.collective": "tree"}
    train(4, pieces, **sharded, **{"sync.level": 2, "parallel.pp": 2})
    for step in (4, STEPS):
        shutil.rmtree(pieces / "checkpoints" / f"step-{step:08}")
    assert train(2, pieces, **sharded, **{"sync.level": 3}) == undisturbed


@pytest.mark.serial
@pytest.mark.slow
def test_a_compiled_pipeline_gives_the_same_bits(train, tmp_path):
    """Also where a schedule splits its backward passes, and where blocks are computed again."""
    compiled = {"run.compile": "on", "run.steps": 3, "checkpoint.every": 0}
    alone = train(1, tmp_path / "one", **compiled)
    for schedule, again in (("1f1b", "true"), ("zb", "false")):
        layout = {"parallel.pp": 2, "parallel.schedule": schedule, "parallel.recompute": again}
        assert train(2, tmp_path / schedule, **compiled, **layout) == alone


@pytest.mark.serial
@pytest.mark.slow
def test_compiled_code_gives_the_same_bits(train, tmp_path):
    """Every rank compiles for itself; what it runs must not depend on how much of a step falls to it."""
    compiled = {"run.compile": "on", "log.validate_every": 0}
    alone = train(1, tmp_path / "one", **compiled)
    assert train(4, tmp_path / "four", **compiled) == alone


@pytest.mark.serial
@pytest.mark.slow
def test_stopping_and_resuming_on_other_ranks_gives_the_same_bits(train, tmp_path):
    """Steps 1 to 4 on two ranks, the rest on one: as on two throughout; the metrics have every step once."""
    exact = {"run.precision": "fp32"}
    undisturbed = train(2, tmp_path / "whole", **exact)
    pieces = tmp_path / "pieces"
    train(2, pieces, **exact)
    shutil.rmtree(pieces / "checkpoints" / f"step-{STEPS:08}")
    assert train(1, pieces, **exact) == undisturbed


@pytest.mark.serial
@pytest.mark.slow
def test_an_mpi_without_threads_gives_the_same_bits(train, tmp_path):
    """Sums wait for the end of the backward pass, and that is said."""
    short = {"run.steps": 2, "log.validate_every": 0, "checkpoint.every": 0}
    alone = train(1, tmp_path / "one", **short)
    for level, pp, said in [("serialized", 1, ""), ("serialized", 2, "without MPI_THREAD_MULTIPLE"),
                            ("funneled", 1, "without MPI_THREAD_SERIALIZED")]:
        env = {"MPI4PY_RC_THREAD_LEVEL": level}
        assert train(2, tmp_path / f"{level}-{pp}", env=env, says=said, **short, **{"parallel.pp": pp}) == alone
