"""The same bits on any layout, stopped or not: whole runs of `mpilm.train`, compared to the last bit."""

from __future__ import annotations

import shutil
import sys

import pytest

from mpilm import evaluate
from tests import datasets, small_jobs
from tests.chaos.jobs import losses, weights

STEPS = 6
OPTIONS = {"run.steps": STEPS, "data.mask_documents": "true", "model.layers": 2, "model.width": 64,
           "optim.warmup_steps": 2, "log.every": 1, "log.validate_every": 3, "log.validation_sequences": 8,
           "checkpoint.every": 2, "checkpoint.keep_last": 9}


@pytest.fixture
def data(comm, tmp_path_all):
    """A small dataset that all ranks see."""
    return datasets.for_all(comm, tmp_path_all / "data")


@pytest.mark.ranks(min=3, max=4)
def test_any_number_of_replicas_or_stages_gives_the_same_bits(comm, data, run_mpi, tmp_path_all, monkeypatch, capsys):
    """The whole program on three replicas that gather weights, for the validation too; on four stages, one for each of
    the embedding, two blocks and the head, in bf16, with buckets of another size. Then it is evaluated. Every
    combination is in test_contract.py."""
    options = OPTIONS | ({"run.precision": "bf16"} if comm.size == 4 else {})
    alone = small_jobs.arguments(data, tmp_path_all / "alone", **options)
    result = run_mpi(0, ["-m", "mpilm.train", *alone])
    assert result.rc == 0, result.stderr
    layout = {3: {"sync.kind": "sharded", "sync.level": 3, "sync.collective": "shared", "sync.bucket_mib": 64},
              4: {"sync.collective": "tree", "sync.bucket_mib": 0.05, "parallel.pp": 4, "parallel.schedule": "zb"}}
    small_jobs.train_here(data, tmp_path_all / "all", **options | layout[comm.size])
    found, expected = ((losses(tmp_path_all / name), weights(tmp_path_all / name)) for name in ("all", "alone"))
    assert found == expected
    monkeypatch.setattr(sys, "argv", ["evaluate", str(tmp_path_all / "alone"), "--sequences", "8"])
    capsys.readouterr()
    evaluate.main()
    told = capsys.readouterr().out
    assert comm.rank or f"validation loss {expected[0][-1][4]:.4f}" in told, told


@pytest.fixture
def train(run_mpi, data):
    """train(ranks, directory, **options) -> what metrics.jsonl and the final checkpoint say. 0 ranks: in this process.
    """
    def run(ranks, directory, env=None, says="", **changes):
        if ranks:
            arguments = small_jobs.arguments(data, directory, **OPTIONS | changes)
            result = run_mpi(ranks, ["-m", "mpilm.train", *arguments], env=env, tuned=True)
            assert result.rc == 0, result.stdout + result.stderr
            assert says in result.stdout + result.stderr
        else:
            small_jobs.train_here(data, directory, **OPTIONS | changes)
        return losses(directory), weights(directory)
    return run


@pytest.fixture
def undisturbed(train, tmp_path):
    """What one rank does that nobody stops."""
    return train(0, tmp_path / "undisturbed")


@pytest.mark.serial
@pytest.mark.slow
def test_stopping_and_resuming_on_any_layout_gives_the_same_bits(train, undisturbed, tmp_path, monkeypatch, capsys):
    """Two steps on two replicas of two stages with gradients divided, two on one rank, two on three stages; the metrics
    have every step once. Then it is evaluated."""
    pieces = tmp_path / "pieces"
    divided = {"sync.kind": "sharded", "sync.level": 2, "sync.collective": "tree"}
    interleaved = {"parallel.pp": 2, "parallel.schedule": "interleaved"}
    for ranks, stop, options in [(4, 2, divided | interleaved), (0, 4, {}), (3, STEPS, {"parallel.pp": 3})]:
        course = train(ranks, pieces, **options)
        for path in (pieces / "checkpoints").iterdir():
            if int(path.name.removeprefix("step-")) > stop:
                shutil.rmtree(path)
    assert course == undisturbed
    monkeypatch.setattr(sys, "argv", ["evaluate", str(pieces), "--sequences", "8"])
    evaluate.main()
    assert f"validation loss {undisturbed[0][-1][4]:.4f}" in capsys.readouterr().out


@pytest.mark.serial
@pytest.mark.slow
def test_an_mpi_without_threads_gives_the_same_bits(train, undisturbed, tmp_path):
    """Sums wait for the end of the backward pass, and that is said."""
    for level, pp, said in [("serialized", 2, "without MPI_THREAD_MULTIPLE"),
                            ("funneled", 1, "without MPI_THREAD_SERIALIZED")]:
        env = {"MPI4PY_RC_THREAD_LEVEL": level}
        assert train(2, tmp_path / level, env=env, says=said, **{"parallel.pp": pp}) == undisturbed
