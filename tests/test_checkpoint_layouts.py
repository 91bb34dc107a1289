"""Any layout writes, any layout reads, and the bits are those that were written."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpilm.checkpoint import Alone, Piece, Writer, newest, parameters, weights_sha256
from mpilm.checkpoint.pieces import deal
from tests.checkpoint_cases import assert_holds, cut, tensors, write
from tests.helpers import everywhere

DTYPES = [np.float32, np.float64, np.float16, np.int64, np.uint16, np.int8, np.bool_]
SHAPES = st.lists(st.integers(0, 7), max_size=3).map(tuple)


@settings(max_examples=25)
@given(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=5), st.integers(0, 10**6),
       st.integers(8, 200))
def test_what_is_read_is_what_was_written(comm, tmp_path_all, kinds, seed, file_bytes):
    rng = np.random.default_rng(seed)
    whole = {f"model.t{number}": rng.integers(0, 2, shape).astype(dtype) if dtype == np.bool_ else
             np.frombuffer(rng.bytes(int(np.prod(shape)) * np.dtype(dtype).itemsize), dtype).reshape(shape)
             for number, (shape, dtype) in enumerate(kinds)}
    directory = tmp_path_all / f"{seed}-{file_bytes}"
    writer = Writer(directory, comm, keep_last=1, file_bytes=file_bytes)
    writer.save(seed, cut(whole, comm.rank, comm.size, seed), {"seed": seed})
    saved = writer.wait()
    reader = newest(directory, comm)
    assert (saved.step, saved.path) == (reader.step, reader.path)
    assert reader.meta == {"seed": seed}
    assert_holds(reader, whole)
    rng = np.random.default_rng(seed + comm.rank)
    for name, array in whole.items():
        start, stop = sorted(rng.integers(0, array.size + 1, 2).tolist())
        found = reader.read(name, start, stop - start)
        everywhere(comm, found.tobytes() == array.reshape(-1)[start:stop].tobytes(), f"{name}[{start}:{stop}]")


def test_the_sum_of_the_weights_is_that_of_any_layout(comm, tmp_path_all):
    write(tmp_path_all / "one", comm, [3], seed=1)
    write(tmp_path_all / "other", comm, [3], seed=2, file_bytes=100)
    comm.Barrier()
    one, other = newest(tmp_path_all / "one", comm), newest(tmp_path_all / "other", Alone())
    assert weights_sha256(one) == weights_sha256(other)
    assert parameters(one) == 61 * 8 + 8 + 1


def test_the_sum_of_the_weights_sees_every_bit_and_name(comm, tmp_path_all):
    sums = set()
    for number, (name, shape, flipped) in enumerate([("a", (6,), 0), ("a", (6,), 1), ("b", (6,), 0), ("a", (2, 3), 0)]):
        values = np.zeros(6, np.uint32)
        values[5] = flipped
        mine = [Piece(f"model.{name}", shape, 0, values.view(np.float32))] if comm.rank == 0 else []
        writer = Writer(tmp_path_all / str(number), comm)
        writer.save(1, mine, {})
        writer.wait()
        sums.add(weights_sha256(newest(tmp_path_all / str(number), comm)))
    assert len(sums) == 4


def test_optimizer_state_is_not_part_of_the_weights(comm, tmp_path_all):
    for number in range(2):
        whole = {**tensors(), "adam_m.embed.weight": np.full((61, 8), number, np.float32)}
        writer = Writer(tmp_path_all / str(number), comm)
        writer.save(1, cut(whole, comm.rank, comm.size), {})
        writer.wait()
    assert weights_sha256(newest(tmp_path_all / "0", comm)) == weights_sha256(newest(tmp_path_all / "1", comm))


def test_the_safetensors_library_reads_the_files(comm, tmp_path_all):
    from safetensors.numpy import load_file

    whole = tensors()
    writer = Writer(tmp_path_all / "c", comm)
    name = list(whole)[comm.rank % len(whole)]
    last = comm.size - 1
    mine = [Piece(name, whole[name].shape, 0, whole[name].reshape(-1))] if comm.rank < len(whole) else []
    rest = [name for index, name in enumerate(whole) if index >= comm.size]
    if comm.rank == last:
        mine += [Piece(name, whole[name].shape, 0, whole[name].reshape(-1)) for name in rest]
    writer.save(7, mine, {})
    path = writer.wait().path
    found = {}
    for file in sorted(path.glob("*.safetensors")):
        found.update(load_file(file))
    assert set(found) == set(whole)
    for name, array in whole.items():
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


def test_pieces_may_change_as_soon_as_save_returns(comm, tmp_path_all):
    values = np.full(100_000, comm.rank, np.float32)
    piece = Piece("model.w", (comm.size * values.size,), comm.rank * values.size, values)
    writer = Writer(tmp_path_all / "c", comm)
    writer.reserve([piece])
    writer.save(1, [piece], {})
    values[:] = -1
    writer.wait()
    found = newest(tmp_path_all / "c", comm).read("model.w", 0, comm.size * values.size)
    assert np.array_equal(found, np.repeat(np.arange(comm.size, dtype=np.float32), values.size))


def test_poll_says_when_a_checkpoint_is_complete(comm, tmp_path_all):
    writer = Writer(tmp_path_all / "c", comm)
    assert writer.poll() is None
    writer.save(5, cut(tensors(5), comm.rank, comm.size), {})
    deadline, polls = time.monotonic() + 60, 0
    while (saved := writer.poll()) is None:
        polls += 1
        assert time.monotonic() < deadline
    assert saved.step == 5
    assert saved.path.is_dir()
    assert comm.allgather(polls) == [polls] * comm.size, "every rank hears of it at the same call"
    assert writer.wait() is None


def test_a_save_waits_for_the_one_before(comm, tmp_path_all):
    writer = Writer(tmp_path_all / "c", comm, keep_last=5)
    for step in range(5):
        writer.save(step, cut(tensors(step), comm.rank, comm.size, step), {})
    writer.wait()
    comm.Barrier()
    assert sorted(path.name for path in (tmp_path_all / "c").iterdir()) == [f"step-{s:08d}" for s in range(5)]


@pytest.mark.parametrize(("parts", "complaint"), [([(0, 4), (5, 9)], "elements 4 to 5 are there not at all"),
                                                  ([(0, 5), (4, 9)], "elements 4 to 5 are there twice"),
                                                  ([(0, 4)], "4 elements instead of 9")])
def test_pieces_that_do_not_cover_a_tensor_are_refused(comm, tmp_path_all, parts, complaint):
    values = np.zeros(9, np.float32)
    pieces = [Piece("model.w", (9,), a, values[a:b]) for n, (a, b) in enumerate(parts) if n % comm.size == comm.rank]
    writer = Writer(tmp_path_all / "c", comm)
    writer.save(1, pieces, {})
    with pytest.raises(ValueError, match=complaint):
        writer.wait()
    comm.Barrier()
    assert list((tmp_path_all / "c").iterdir()) == []


def test_pieces_must_agree_about_their_tensor(comm, tmp_path_all):
    values = np.zeros(4, np.float32)
    pieces = [Piece("model.w", (8,), 0, values), Piece("model.w", (2, 4), 4, values)]
    writer = Writer(tmp_path_all / "c", comm)
    writer.save(1, [piece for number, piece in enumerate(pieces) if number % comm.size == comm.rank], {})
    with pytest.raises(ValueError, match="disagree"):
        writer.wait()


@given(st.lists(st.tuples(st.integers(0, 50), st.sampled_from(DTYPES)), max_size=8), st.integers(1, 100))
def test_no_file_is_larger_than_asked_for(sizes, file_bytes):
    pieces = [Piece(f"t{n}", (size,), 0, np.zeros(size, dtype)) for n, (size, dtype) in enumerate(sizes)]
    files = deal(pieces, file_bytes)
    for file in files:
        assert len(file) == 1 or sum(piece.array.nbytes for piece in file) <= file_bytes
        widths = [piece.array.itemsize for piece in file]
        assert widths == sorted(widths, reverse=True), "so that every array is aligned"
    covered = sorted((piece.name, piece.start, piece.stop) for file in files for piece in file)
    for piece in pieces:
        runs = [(start, stop) for name, start, stop in covered if name == piece.name]
        assert [start for start, _ in runs[1:]] == [stop for _, stop in runs[:-1]]
        assert sum(stop - start for start, stop in runs) == piece.array.size
