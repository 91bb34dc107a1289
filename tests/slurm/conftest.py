"""A Slurm for the tests of this folder, and what they train: one dataset, one undisturbed run."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from tests import datasets, small_jobs
from tests.chaos.jobs import weights
from tests.slurm import cluster
from tests.slurm.submitted import Submitted


@pytest.fixture(scope="session")
def slurm() -> Iterator[cluster.Cluster]:
    """A cluster; its directory has a short name, because sockets must have."""
    if reason := cluster.missing():
        pytest.skip(reason)
    directory = Path(tempfile.mkdtemp(prefix="mpilm-slurm-"))
    try:
        with cluster.Cluster(directory) as running:
            yield running
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="session")
def site() -> str:
    """The settings of jobs/sites for the MPI that the tests run with."""
    return "openmpi" if MPI.get_vendor()[0] == "Open MPI" else "mpich"


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Step and weights of a run of `small_jobs.OPTIONS`, but for three steps, without Slurm."""
    directory = tmp_path_factory.mktemp("undisturbed") / "run"
    small_jobs.train_here(data, directory, **{"run.steps": 3})
    return weights(directory)


@pytest.fixture
def submit_script(slurm: cluster.Cluster, tmp_path: Path) -> Iterator[Callable[..., Submitted]]:
    """Submit a script of jobs/, with its arguments; cancelled at the end of the test."""
    jobs: list[Submitted] = []

    def submitting(script: str, *arguments: str, **options: Any) -> Submitted:
        jobs.append(Submitted(slurm, script, *arguments, log=tmp_path / "log.txt", **options))
        return jobs[-1]

    yield submitting
    for job in jobs:
        job.cancel()


@pytest.fixture
def submit(submit_script: Callable[..., Submitted], site: str, data: Path, tmp_path: Path
           ) -> Callable[..., Submitted]:
    """`submit("train_one_node", "--time=1", **{"run.steps": 9})` trains `tmp_path / "run"`, three steps if not told."""

    def submitting(script: str, *options: str, site: str = site, **changes: Any) -> Submitted:
        changes = {"run.steps": 3, "log.every": 1} | changes
        arguments = small_jobs.arguments(data, tmp_path / "run", **changes)
        return submit_script(script, *arguments, options=options, site=site)

    return submitting
