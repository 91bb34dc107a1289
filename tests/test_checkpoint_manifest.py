"""Manifests and headers made up by somebody else are refused, or make sense."""

from __future__ import annotations

import copy
import hashlib
import json
import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.checkpoint import DamagedError, Piece, checksum, manifest, tensorfile, verified
from mpilm.checkpoint.pieces import deal
from mpilm.log import UserError
from tests import checkpoint_cases as cases
from tests.chaos.damage import flip

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 300) | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from(["F32", "model.a", "../x.safetensors", "/etc/passwd", "a.safetensors", "0" * 64]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3), max_leaves=6)


def good():
    pieces = [Piece("model.a", (4, 3), 0, np.zeros(5, np.float32)), Piece("model.a", (4, 3), 5, np.ones(7, np.float32)),
              Piece("model.b", (2,), 0, np.zeros(2, np.int64))]
    files = [(f"rank-00000-part-{n:02d}.safetensors", file, 1000, "0" * 32) for n, file in enumerate(deal(pieces, 30))]
    return json.loads(manifest.dumps(7, [manifest.record(files, pieces)], {"a": [1, None, 2.5]}))


def sealed(body):
    """With the checksum that fits, as someone who means harm would give it."""
    body = {key: value for key, value in body.items() if key != "sha256"}
    text = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    return json.dumps({**body, "sha256": hashlib.sha256(text).hexdigest()}).encode()


def places(value, path=()):
    yield path
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from places(inner, (*path, key))


def replaced(body, path, value):
    body = copy.deepcopy(body)
    inner = body
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return body


def test_what_is_written_is_read():
    read = manifest.loads(json.dumps(good()).encode())
    assert (read.step, read.ranks, read.meta) == (7, 1, {"a": [1, None, 2.5]})
    assert read.tensors["model.a"].shape == (4, 3)
    assert [(run.start, run.count) for run in read.tensors["model.a"].runs] == [(0, 5), (5, 7)]


@pytest.mark.serial
@settings(max_examples=300)
@given(st.data())
def test_a_forged_manifest_makes_sense_or_is_refused(data):
    body = good()
    path = data.draw(st.sampled_from([path for path in places(body) if path]))
    forged = replaced(body, path, data.draw(JSON))
    try:
        read = manifest.loads(sealed(forged))
    except UserError:
        return
    for name, tensor in read.tensors.items():
        assert sum(run.count for run in tensor.runs) == tensor.size, name
        assert all(run.file in read.files and "/" not in run.file for run in tensor.runs)
    total = sum(tensor.size * tensor.dtype.itemsize for tensor in read.tensors.values())
    assert total <= sum(file.bytes for file in read.files.values())


@pytest.mark.serial
@settings(max_examples=200)
@given(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_anything_else_is_no_manifest(text):
    with pytest.raises(DamagedError):
        manifest.loads(text)


@pytest.mark.parametrize(("text", "told"), [
    (b"null", "it is JSON, but not an object"), (b"[]", "it is JSON, but not an object"), (b"{", "it is not JSON"),
    (b"", "it is not JSON"), (b"{}", "its format is 'None'"), (b'{"format": 1}', "its format is '1'"),
    (b'{"format": "mpilm checkpoint", "version": 2}', "its checksum is gone"),
])
def test_why_it_is_none(text, told):
    with pytest.raises(DamagedError, match=told):
        manifest.loads(text)


@pytest.mark.parametrize("text", [b"[" * 100_000, b'{"a":' * 100_000, b"1" * 5000, b'{"sha256": 1}', b"\xff\xfe"])
def test_traps_for_parsers(text):
    with pytest.raises(DamagedError, match="is not a manifest"):
        manifest.loads(text)


@pytest.mark.parametrize("name", ["../a.safetensors", "/a.safetensors", "a/b.safetensors", ".a.safetensors", "a.pkl"])
def test_no_file_name_leaves_the_directory(name):
    body = good()
    body["files"] = {name: {"bytes": 1000, checksum.WRITTEN: "0" * 32}}
    for tensor in body["tensors"].values():
        for run in tensor["runs"]:
            run["file"] = name
    with pytest.raises(DamagedError, match="is not the name of a file of a checkpoint"):
        manifest.loads(sealed(body))


def test_another_version_is_named():
    with pytest.raises(UserError, match="version 3 of the format, this program reads version 1 or 2") as told:
        manifest.loads(sealed({**good(), "version": 3}))
    assert not isinstance(told.value, DamagedError), "going on from an older checkpoint would lose work"
    with pytest.raises(DamagedError, match="its version is '4', not version 1 or 2"):
        manifest.loads(json.dumps({**good(), "version": 4}).encode())


@pytest.mark.serial
def test_what_version_1_wrote_is_read_and_compared(comm, tmp_path):
    cases.write(tmp_path, comm, [1])
    path = tmp_path / "step-00000001"
    body = {**json.loads((path / manifest.FILE).read_text()), "version": 1}
    for name, entry in body["files"].items():
        del entry[checksum.WRITTEN]
        entry["sha256"] = hashlib.sha256((path / name).read_bytes()).hexdigest()
    (path / manifest.FILE).write_bytes(sealed(body))
    cases.assert_holds(verified(path, comm), cases.tensors(1))
    flip(next(path.glob("*.safetensors")), 8000)
    with pytest.raises(DamagedError, match="was changed after it was written"):
        verified(path, comm)


def test_another_program_is_named():
    with pytest.raises(DamagedError, match="its format is 'somebody else'"):
        manifest.loads(sealed({**good(), "format": "somebody else"}))


def test_huge_tensors_are_refused_before_there_is_memory_for_them():
    body = replaced(good(), ("tensors", "model.a", "shape"), [1 << 40])
    body["tensors"]["model.a"]["runs"] = [{**body["tensors"]["model.a"]["runs"][0], "start": 0, "count": 1 << 40}]
    with pytest.raises(DamagedError, match="can't hold"):
        manifest.loads(sealed(body))
    body["tensors"]["model.a"]["shape"] = [1 << 61] * 100_000
    with pytest.raises(DamagedError, match="too many dimensions"):
        manifest.loads(sealed(body))


def contents(path, data):
    path.write_bytes(data)
    file = os.open(path, os.O_RDONLY)
    try:
        return tensorfile.contents(file, len(data))
    finally:
        os.close(file)


@pytest.mark.serial
@settings(max_examples=200)
@given(st.data())
def test_a_forged_header_makes_sense_or_is_refused(tmp_path_all, comm, data):
    piece = Piece("model.a", (3, 2), 0, np.arange(6, dtype=np.float32))
    body = json.loads(tensorfile.header([piece], 1)[8:])
    path = data.draw(st.sampled_from([path for path in places(body) if path]))
    text = json.dumps(replaced(body, path, data.draw(JSON))).encode()
    wrong = [0, 1, len(text) + 24, len(text) + 25, 1 << 40, (1 << 64) - 1]
    length = data.draw(st.sampled_from([len(text)] * len(wrong) + wrong))
    whole = length.to_bytes(8, "little") + text + piece.array.tobytes()
    try:
        found = contents(tmp_path_all / f"{comm.rank}", whole)
    except ValueError:
        return
    for stored in found.values():
        assert 8 <= stored.offset <= stored.offset + int(np.prod(stored.shape)) * stored.dtype.itemsize <= len(whole)


def test_files_that_are_too_short_for_a_header(tmp_path_all, comm):
    for size in range(10):
        with pytest.raises(ValueError):
            contents(tmp_path_all / f"{comm.rank}", b"\1" * size)
