"""The same bits on any layout, stopped or not: real jobs of `python -m mpilm.train`, compared to the last bit."""

from __future__ import annotations

import shutil

import pytest

from tests import datasets, small_jobs
from tests.chaos.jobs import losses, weights

STEPS = 6
OPTIONS = {"run.steps": STEPS, "data.mask_documents": "true", "model.layers": 2, "model.width": 64,
           "optim.warmup_steps": 2, "log.every": 1, "log.validate_every": 3, "log.validation_sequences": 8,
           "checkpoint.every": 2, "checkpoint.keep_last": 9}
pytestmark = [pytest.mark.serial, pytest.mark.slow]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One small dataset for all runs."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.fixture
def train(run_mpi, data):
    """train(ranks, directory, **options) -> what metrics.jsonl and the final checkpoint say."""
    def run(ranks, directory, env=None, says="", **changes):
        arguments = small_jobs.arguments(data, directory, **OPTIONS | changes)
        result = run_mpi(ranks, ["-m", "mpilm.train", *arguments], env=env)
        assert result.rc == 0, result.stdout + result.stderr
        assert says in result.stdout + result.stderr
        return losses(directory), weights(directory)
    return run


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """What one rank does that nobody stops."""
    return alone(data, tmp_path_factory.mktemp("undisturbed"))


def alone(data, directory, **changes):
    """The job of one rank, in this process."""
    small_jobs.train_here(data, directory, **OPTIONS | changes)
    return losses(directory), weights(directory)


def test_any_number_of_replicas_gives_the_same_bits(train, undisturbed, tmp_path):
    """Every combination is in test_contract.py; these are whole jobs."""
    assert train(3, tmp_path / "run", **{"sync.collective": "shared", "sync.bucket_mib": 64}) == undisturbed


def test_any_number_of_stages_gives_the_same_bits(train, data, tmp_path):
    """One for each of the embedding, two blocks and the head; in bf16; buckets of another size."""
    short = {"run.steps": 3, "run.precision": "bf16"}
    stages = {"sync.collective": "tree", "sync.bucket_mib": 0.05, "parallel.pp": 4, "parallel.schedule": "zb"}
    assert train(4, tmp_path / "stages", **short, **stages) == alone(data, tmp_path / "alone", **short)


def test_stopping_and_resuming_on_any_layout_gives_the_same_bits(train, undisturbed, run_mpi, tmp_path):
    """Two steps on two replicas of two stages with gradients divided, two on three stages, two on two ranks that gather
    weights, for the validation too; the metrics have every step once. Then it is evaluated."""
    pieces = tmp_path / "pieces"
    divided = {"sync.kind": "sharded", "sync.collective": "tree"}
    interleaved = {"parallel.pp": 2, "parallel.schedule": "interleaved"}
    for ranks, stop, options in [(4, 2, divided | interleaved | {"sync.level": 2}), (3, 4, {"parallel.pp": 3}),
                                 (2, STEPS, divided | {"sync.level": 3})]:
        course = train(ranks, pieces, **options)
        for path in (pieces / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > stop:
                shutil.rmtree(path)
    assert course == undisturbed
    told = run_mpi(2, ["-m", "mpilm.evaluate", str(pieces), "--sequences", "8"]).stdout
    assert f"validation loss {undisturbed[0][-1][4]:.4f}" in told


def test_an_mpi_without_threads_gives_the_same_bits(train, undisturbed, tmp_path):
    """Sums wait for the end of the backward pass, and that is said."""
    for level, pp, said in [("serialized", 2, "without MPI_THREAD_MULTIPLE"),
                            ("funneled", 1, "without MPI_THREAD_SERIALIZED")]:
        env = {"MPI4PY_RC_THREAD_LEVEL": level}
        assert train(2, tmp_path / level, env=env, says=said, **{"parallel.pp": pp}) == undisturbed
