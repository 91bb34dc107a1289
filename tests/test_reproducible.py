"""The same bits on any layout, stopped or not: real jobs of `python -m mpilm.train`, compared to the last bit."""

from __future__ import annotations

import json
import shutil

import pytest

from mpilm import inspect
from tests import datasets

STEPS = 6
OPTIONS = {"run.steps": STEPS, "run.compile": "off", "run.precision": "fp32", "data.sequence_length": 32,
           "data.global_batch_size": 8, "data.micro_batch_size": 2, "model.layers": 2, "model.width": 64,
           "model.heads": 2, "optim.warmup_steps": 2, "log.every": 1, "log.validate_every": 3,
           "log.validation_sequences": 8, "log.tensorboard": "false", "checkpoint.every": 2, "checkpoint.keep_last": 9}


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


@pytest.fixture(scope="module")
def results():
    """Of runs that several tests compare with: name -> what `train` returned."""
    return {}


@pytest.fixture
def undisturbed(train, results, tmp_path):
    """What one rank does that nobody stops."""
    if "undisturbed" not in results:
        results["undisturbed"] = train(1, tmp_path / "undisturbed")
    assert len(results["undisturbed"][0]) == STEPS
    return results["undisturbed"]


@pytest.mark.serial
@pytest.mark.slow
def test_any_layout_gives_the_same_bits(train, undisturbed, tmp_path):
    """An odd number of ranks and an even one; shared and tree; buckets of any size."""
    layouts = [(3, {"sync.collective": "shared", "sync.bucket_mib": 64}),
               (4, {"sync.collective": "tree", "sync.bucket_mib": 0.05})]
    for ranks, options in layouts:
        assert train(ranks, tmp_path / str(ranks), **options) == undisturbed, (ranks, options)


@pytest.mark.serial
@pytest.mark.slow
def test_any_pipeline_gives_the_same_bits(train, tmp_path):
    """Replicas of stages, and four stages of one unit each: embedding, block, block, head.

    Every combination is in test_contract.py; these are whole jobs, with validation and documents."""
    short = {"run.steps": 3, "checkpoint.every": 0, "run.precision": "bf16", "data.mask_documents": "true"}
    alone = train(1, tmp_path / "one", **short)
    for pp, schedule in [(2, "interleaved"), (4, "zb")]:
        options = {"parallel.pp": pp, "parallel.schedule": schedule} | short
        assert train(4, tmp_path / schedule, **options) == alone, (pp, schedule)


@pytest.mark.serial
@pytest.mark.slow
def test_stopping_and_resuming_on_any_layout_gives_the_same_bits(train, undisturbed, run_mpi, tmp_path):
    """Two steps on two ranks, one on two replicas of two stages with gradients divided, one on three stages, two on two
    ranks that gather weights, for the validation too; the metrics have every step once. Then it is evaluated."""
    pieces = tmp_path / "pieces"
    divided = {"sync.kind": "sharded", "sync.collective": "tree"}
    for ranks, stop, options in [(2, 2, {}), (4, 3, divided | {"sync.level": 2, "parallel.pp": 2}),
                                 (3, 4, {"parallel.pp": 3}), (2, STEPS, divided | {"sync.level": 3})]:
        course = train(ranks, pieces, **options, **{"checkpoint.every": 1})
        for step in range(stop + 1, STEPS + 1):
            shutil.rmtree(pieces / "checkpoints" / f"step-{step:08}")
    assert course == undisturbed
    told = [run_mpi(ranks, ["-m", "mpilm.evaluate", str(pieces), "--sequences", "8"]).stdout for ranks in (1, 2)]
    assert told[0] == told[1] and f"validation loss {undisturbed[0][-1][3]:.4f}" in told[0], told


@pytest.mark.serial
@pytest.mark.slow
def test_compiled_code_gives_the_same_bits(train, tmp_path):
    """Every rank compiles for itself, and what it runs must not depend on how much of a step falls to it; also where a
    schedule splits its backward passes, and where blocks are computed again."""
    compiled = {"run.compile": "on", "run.steps": 3, "checkpoint.every": 0}
    alone = train(1, tmp_path / "one", **compiled)
    for ranks, schedule, again in ((2, "1f1b", "true"), (2, "zb", "false")):
        layout = {"parallel.pp": 2, "parallel.schedule": schedule, "parallel.recompute": again}
        assert train(ranks, tmp_path / schedule, **compiled, **layout) == alone


@pytest.mark.serial
@pytest.mark.slow
def test_an_mpi_without_threads_gives_the_same_bits(train, undisturbed, tmp_path):
    """Sums wait for the end of the backward pass, and that is said."""
    for level, pp, said in [("serialized", 2, "without MPI_THREAD_MULTIPLE"),
                            ("funneled", 1, "without MPI_THREAD_SERIALIZED")]:
        env = {"MPI4PY_RC_THREAD_LEVEL": level}
        assert train(2, tmp_path / level, env=env, says=said, **{"parallel.pp": pp}) == undisturbed
