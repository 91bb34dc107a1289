"""A rank is killed, at every kind of moment: the others go on, to the same weights and losses."""

from __future__ import annotations

import json
import random
from math import prod

import pytest
from mpi4py import MPI

from tests import datasets, helpers, small_jobs
from tests.chaos import soak
from tests.chaos.jobs import OPTIONS, losses, weights

pytestmark = [pytest.mark.serial, pytest.mark.skipif(MPI.get_vendor()[0] != "Open MPI", reason="needs ULFM: Open MPI")]
STEPS = 12
SMALL = OPTIONS | {"run.steps": STEPS, "checkpoint.every": 4, "log.validate_every": 6, "log.every": 2}
PIPELINES = {"parallel.pp": 2}
SPARE = {"run.spares": 1}
SHARED = {"sync.collective": "shared"}
SHARDED = {"sync.kind": "sharded", "sync.level": 2}

# name: ranks, who dies where (rank:module:function:call), options. Mostly one after the other, in one job.
MOMENTS = {
    "before there is anything, before there is a model, computing": (
        4, "0:mpilm.resume:make_way:1,1:mpilm.assemble:build:1,2:mpilm.parallel.pipeline:Pipeline.run:5",
        {"run.resume": "never"}),
    "in a sum, half through an update, before it agrees": (
        4, "2:mpilm.comm.collectives.shared:Shared.reduce:5,0:mpilm.optim:Update._apply_chunk:20,"
           "1:mpilm.ulfm:Commit.take:9", SHARED),
    "in a message": (2, "0:mpilm.comm.p2p:Ledger.wait:40", {"sync.collective": "tree"}),
    "between stages, then one without a replica": (
        4, "1:mpilm.parallel.messages:Messages.send:9,2:mpilm.parallel.messages:Messages.send:24", PIPELINES),
    "writing a checkpoint, finishing one, before it updates": (
        4, "1:mpilm.checkpoint.files:write_share:1,0:mpilm.checkpoint.files:commit:2,"
           "2:mpilm.sync.allreduce:Allreduce._update:12", SHARED),
    "evaluating, then saving what is left": (
        3, "1:mpilm.validation:Validation.loss:1,0:mpilm.checkpoint.files:commit:2", {}),
    "sharded, then evaluating": (
        3, "2:mpilm.parallel.pipeline:Pipeline.run:3,1:mpilm.validation:Validation.loss:1", SHARDED),
    "while others recover": (
        4, "1:mpilm.parallel.pipeline:Pipeline.run:7,2:mpilm.recovery:_save:1,0:mpilm.assemble:program:2", {}),
    "before it tells of a step, then all but a spare": (
        3, "0:mpilm.trainer:heed_skips:6,1:mpilm.assemble:program:2", SPARE),
    "a spare, then one for whom a spare steps in, then at the end": (
        4, "2:mpilm.recovery:Run._muster:1,1:mpilm.parallel.pipeline:Pipeline.run:7,0:mpilm.train:summarize:1",
        {"run.spares": 2}),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset."""
    return datasets.small(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Weights and curve of one rank's run."""
    directory = tmp_path_factory.mktemp("undisturbed")
    small_jobs.train_here(data, directory, **SMALL)
    return weights(directory), losses(directory)


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_rank_is_killed(data, undisturbed, tmp_path, moment):
    ranks, kills, options = MOMENTS[moment]
    arguments = small_jobs.arguments(data, tmp_path, **SMALL | options)
    result = helpers.run_nested(ranks, ["-m", "tests.hurt_job", kills, *arguments], launcher=["--with-ft", "ulfm"])
    assert result.rc == 0, result.stdout + result.stderr
    assert result.stdout.count(" died") == len(kills.split(",")), result.stdout
    assert (weights(tmp_path), losses(tmp_path)) == undisturbed
    manifest = json.loads((tmp_path / f"checkpoints/step-{STEPS:08}/manifest.json").read_text())
    assert prod(manifest["meta"]["layout"].values()) <= ranks - options.get("run.spares", 0)


def test_a_rank_is_killed_when_all_is_done(data, undisturbed, tmp_path):
    """The others have nothing to go on with, and do not wait for it."""
    arguments = small_jobs.arguments(data, tmp_path, **SMALL)
    result = helpers.run_nested(3, ["-m", "tests.hurt_job", "1:mpilm.ulfm:Commit.withdraw:1", *arguments],
                                launcher=["--with-ft", "ulfm"])
    assert result.rc == 0, result.stdout + result.stderr
    assert result.stdout.count("finished at step") == 1, result.stdout
    assert (weights(tmp_path), losses(tmp_path)) == undisturbed


def test_nothing_piles_up_over_many_deaths(data, tmp_path):
    trials = list(soak.soak(3, random.Random(1), data, tmp_path))
    assert not [trial for trial in trials if trial.problem]
    assert len(trials) == 4
