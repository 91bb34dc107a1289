"""Checkpoints that are intact and say nonsense: refused in a sentence, or what they say makes sense."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpilm import resume, state, trained
from mpilm.checkpoint import Alone, manifest
from mpilm.log import UserError
from tests import datasets, small_jobs
from tests.test_checkpoint_manifest import JSON, places, replaced, sealed

pytestmark = pytest.mark.serial


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Of a run of one step, and what its manifest says."""
    directory = tmp_path_factory.mktemp("run")
    data = datasets.for_all(MPI.COMM_WORLD, tmp_path_factory.mktemp("data"))
    small_jobs.train_here(data, directory, **{"run.steps": 1, "log.validate_every": 0})
    path = directory / "checkpoints" / "step-00000001"
    return path, json.loads((path / manifest.FILE).read_text())


@settings(max_examples=150)
@given(st.data())
def test_whatever_a_manifest_says_of_its_run(checkpoint, data):
    path, body = checkpoint
    place = data.draw(st.sampled_from([place for place in places(body["meta"]) if place]))
    forged = {**body, "meta": replaced(body["meta"], place, data.draw(JSON))}
    (path / manifest.FILE).write_bytes(sealed(forged))
    told = None
    try:
        reader = resume.open_run(str(path), Alone())
        resume.config_of(reader)
        resume.check(reader, shape=body["meta"]["shape"], data={"fingerprint": body["meta"]["data"]["fingerprint"]},
                     config=resume.config_of(reader))
        state.start(reader)
        state.owed(reader)
        trained.model(reader)
    except UserError as error:
        told = str(error)
    assert told is None or str(path) in told


def test_a_model_that_is_not_there(checkpoint):
    path, body = checkpoint
    for shape, named in [({"layers": 10**12}, "so deep"), ({"width": 48}, "embed_tokens"), ({"layers": 2}, "layers.1")]:
        forged = {**body, "meta": {**body["meta"], "shape": {**body["meta"]["shape"], **shape}}}
        (path / manifest.FILE).write_bytes(sealed(forged))
        with pytest.raises(UserError, match=named):
            resume.config_of(resume.open_run(str(path), Alone()))
