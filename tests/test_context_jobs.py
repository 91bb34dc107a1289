"""A run whose ranks share sequences: training, documents, validation and the sample, beside the job of one rank."""

from __future__ import annotations

import pytest

from tests import datasets, small_jobs
from tests.chaos.jobs import losses

OPTIONS = {"run.steps": 3, "data.sequence_length": 64, "data.mask_documents": "true", "model.layers": 2,
           "model.width": 64, "optim.eps": 1e-3, "log.every": 1, "log.validate_every": 3, "log.validation_sequences": 8}


@pytest.mark.ranks(min=4, max=4)
def test_a_run_on_4_ranks_is_the_job_of_one(comm, run_mpi, tmp_path_all, capsys):
    """Two stages whose ranks share sequences in pairs: losses, norms and validation to 1e-5."""
    data = datasets.for_all(comm, tmp_path_all / "data")
    result = run_mpi(0, ["-m", "mpilm.train", *small_jobs.arguments(data, tmp_path_all / "one", **OPTIONS)])
    assert result.rc == 0, result.stdout + result.stderr
    small_jobs.train_here(data, tmp_path_all / "all", **OPTIONS | {"parallel.cp": 2, "parallel.pp": 2})
    assert comm.rank or "the model writes:" in capsys.readouterr().out
    assert course(tmp_path_all / "all") == pytest.approx(course(tmp_path_all / "one"), rel=1e-5)


def course(directory):
    """Losses and norms, and the last validation loss."""
    lines = losses(directory)
    return [value for _, loss, _, norm, _ in lines for value in (loss, norm)] + [lines[-1][-1]]
