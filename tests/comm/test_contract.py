"""What every entry of the collectives menu promises, checked on every file of the folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mpi4py import MPI

from mpilm.comm import collectives, order
from mpilm.comm.arrays import MESSAGE_BYTES, address, fetch
from mpilm.comm.collectives import Collective, _pipeline, tree
from mpilm.comm.node import Node
from mpilm.log import UserError
from tests.comm import cases, places
from tests.helpers import everywhere, same_everywhere

Watch = Callable[[float], AbstractContextManager[None]]


@pytest.fixture(params=places.pairs(*collectives.names()))
def collective(request: pytest.FixtureRequest, comm: MPI.Comm) -> Iterator[Collective]:
    """Every file of the menu in every place, skipped where it has said why it cannot work."""
    place, name = request.param
    transport = places.transport(place, comm)
    node = Node.build(comm)
    built = cases.build(name, comm, node, transport=transport)
    if built is None:
        node.free()
        pytest.skip(f"{name} does not take {comm.size} ranks, or not in this place")
    yield built
    built.free()
    node.free()


@settings(max_examples=15)
@given(count=st.integers(0, 70_000), dtype=st.sampled_from(cases.DTYPES), ours=st.booleans(), seed=st.integers(0, 99))
@example(count=0, dtype="float32", ours=True, seed=0)
@example(count=1, dtype="float64", ours=False, seed=0)
@example(count=1, dtype="int64", ours=True, seed=0)
@example(count=2, dtype="float32", ours=True, seed=0)
@example(count=3, dtype="float32", ours=False, seed=0)
@example(count=order.BLOCK * 5 + 7, dtype="float32", ours=True, seed=0)
@example(count=1_500_001, dtype="float32", ours=False, seed=0)
@example(count=1_500_001, dtype="float32", ours=True, seed=0)
@example(count=700_001, dtype="float64", ours=False, seed=0)
def test_sums_like_numpy_and_all_ranks_hold_the_same_bits(
    collective: Collective, count: int, dtype: str, ours: bool, seed: int
) -> None:
    comm = collective.comm
    count = places.fitting(collective.device, count)
    buffer = collective.allocate(count, dtype) if ours else collective.device.empty(count, dtype)
    buffer[:] = cases.values(comm.rank, count, dtype, seed)
    collective.allreduce(buffer)
    got = fetch(buffer)
    everywhere(comm, cases.close(got, cases.expected(comm.size, count, dtype, seed), comm.size), "the sum")
    same_everywhere(comm, got)


@pytest.mark.parametrize("where", ["in a node", "in a node with little room", "between nodes"])
@pytest.mark.parametrize("name", ["ring", "tree"])
def test_messages_of_any_length_make_the_same_sums(name: str, where: str, comm: MPI.Comm,
                                                   monkeypatch: pytest.MonkeyPatch) -> None:
    """Longer ones within a node than between nodes, in one block or in many."""
    if where == "between nodes":
        monkeypatch.setenv("MPILM_RANKS_PER_NODE", "1")
    if where == "in a node with little room":
        for module in (_pipeline, tree):
            monkeypatch.setattr(module, "NODE_SEGMENT_BYTES", 2**17)
    node = Node.build(comm)
    built = cases.build(name, comm, node)
    if built is None:
        node.free()
        pytest.skip(f"{name} does not take {comm.size} ranks")
    block = built._pipeline.block_bytes
    longest = max((stage.receive.stop - stage.receive.start for stage in built._pipeline._stages(block)), default=0)
    try:
        everywhere(comm, (block >= 2**24) == (where == "in a node") or comm.size == 1, f"blocks of {block}")
        everywhere(comm, longest <= _pipeline.NODE_SEGMENT_BYTES <= MESSAGE_BYTES, f"messages of {longest}")
        for count, dtype in ((2_500_001, "float32"), (1_100_003, "int64")):
            buffer = built.allocate(count, dtype)
            for sum_up in (built.allreduce, lambda values: (built.reduce_scatter(values), built.allgather(values))):
                buffer[:] = cases.values(comm.rank, count, dtype, seed=1)
                sum_up(buffer)
                expected = cases.expected(comm.size, count, dtype, seed=1)
                everywhere(comm, cases.close(buffer, expected, comm.size), f"{count} x {dtype}")
                same_everywhere(comm, buffer)
    finally:
        built.free()
        node.free()


@settings(max_examples=10)
@given(count=st.integers(0, 200_000), dtype=st.sampled_from(cases.DTYPES), ours=st.booleans())
@example(count=1_500_001, dtype="float32", ours=True)
def test_reduce_leaves_the_sum_with_its_owners(collective: Collective, count: int, dtype: str, ours: bool) -> None:
    comm = collective.comm
    count = places.fitting(collective.device, count)
    buffer = collective.allocate(count, dtype) if ours else collective.device.empty(count, dtype)
    buffer[:] = cases.values(comm.rank, count, dtype)
    seen: list[tuple[slice, np.ndarray]] = []
    collective.reduce(buffer, lambda part: seen.append((part, fetch(buffer[part]).copy())))
    own = order.segments(count, collective.owners.size)[collective.owners.rank]
    wanted = cases.expected(comm.size, count, dtype, part=own)
    everywhere(comm, cases.close(fetch(buffer[own]), wanted, comm.size), "my segment")
    edges = [own.start, *(part.stop for part, _ in seen)]
    everywhere(comm, [part.start for part, _ in seen] == edges[:-1] and edges[-1] == own.stop, "told whole, in order")
    everywhere(comm, all((edge - own.start) % order.BLOCK == 0 for edge in edges[:-1]), "cut between blocks")
    told = np.concatenate([fetch(buffer[:0]), *(values for _, values in seen)])
    everywhere(comm, np.array_equal(told, fetch(buffer[own])), "told when it was there")


@settings(max_examples=15)
@given(count=st.integers(0, 200_000), dtype=st.sampled_from(cases.DTYPES), ours=st.booleans())
@example(count=0, dtype="float32", ours=True)
@example(count=2, dtype="int64", ours=False)
@example(count=1_500_001, dtype="float32", ours=False)
@example(count=5_000_001, dtype="float32", ours=True)
def test_reduce_scatter_leaves_everyone_a_segment(
    collective: Collective, count: int, dtype: str, ours: bool
) -> None:
    comm = collective.comm
    count = places.fitting(collective.device, count)
    buffer = collective.allocate(count, dtype) if ours else collective.device.empty(count, dtype)
    buffer[:] = cases.values(comm.rank, count, dtype)
    collective.reduce_scatter(buffer)
    own = order.segments(count, comm.size)[comm.rank]
    wanted = cases.expected(comm.size, count, dtype, part=own)
    everywhere(comm, cases.close(fetch(buffer[own]), wanted, comm.size), "my segment")


@settings(max_examples=15)
@given(count=st.integers(0, 200_000), dtype=st.sampled_from((*cases.DTYPES, "uint16")), common=st.booleans())
@example(count=0, dtype="uint16", common=True)
@example(count=2, dtype="int64", common=False)
@example(count=5_000_001, dtype="uint16", common=False)
@example(count=5_000_001, dtype="float32", common=True)
def test_allgather_puts_every_segment_in_its_place(
    collective: Collective, count: int, dtype: str, common: bool
) -> None:
    comm = collective.comm
    count = places.fitting(collective.device, count)
    whole = (np.arange(count) % 60_013).astype(dtype)
    buffer = collective.allocate_common(count, dtype) if common else collective.device.zeros(count, dtype)
    own = order.segments(count, comm.size)[comm.rank]
    buffer[own] = whole[own]
    collective.allgather(buffer)
    everywhere(comm, (fetch(buffer) == whole).all(), "everything")


def test_common_memory_is_one_for_all_owners(collective: Collective) -> None:
    owners = collective.owners
    buffer = collective.allocate_common(owners.size, np.float32)
    owners.Barrier()
    buffer[owners.rank] = 1 + owners.rank
    owners.Barrier()
    everywhere(collective.comm, (fetch(buffer) == np.arange(1, owners.size + 1)).all())


def test_allocates_zeroed_aligned_memory(collective: Collective) -> None:
    for count in (0, 1, 1000):
        buffer = collective.allocate(count, np.float32)
        assert (buffer.shape, buffer.dtype) == ((count,), np.float32)
        assert not fetch(buffer).any()
        assert count == 0 or address(buffer) % 64 == 0


def test_sums_again_and_again(collective: Collective) -> None:
    """Nothing of one sum leaks into the next, whoever is late."""
    comm = collective.comm
    buffer, other = collective.allocate(5000, np.int64), collective.device.zeros(5000, np.int64)
    for turn in range(20):
        for array in (buffer, other):
            array[:] = turn + comm.rank
            collective.allreduce(array)
            everywhere(comm, (fetch(array) == comm.size * turn + sum(range(comm.size))).all(), f"turn {turn}")


@pytest.mark.parametrize("array", [
    np.zeros(4, np.float16), np.zeros(4, np.int32), np.zeros(4, np.uint16), np.zeros(4, np.complex64),
    np.zeros((2, 2), np.float32), np.zeros(8, np.float32)[::2], np.frombuffer(bytes(16), np.float32), [1.0, 2.0],
], ids=["float16", "int32", "uint16", "complex64", "2-D", "strided", "read-only", "list"])
def test_what_it_cannot_sum_is_a_type_error(collective: Collective, array: np.ndarray, watch: Watch) -> None:
    with watch(20), pytest.raises(TypeError, match="float32, float64, int64"):
        collective.allreduce(array)


@pytest.mark.ranks(min=2)
def test_one_rank_with_a_wrong_type_is_an_error_on_all(collective: Collective, watch: Watch) -> None:
    last = collective.comm.rank == collective.comm.size - 1
    with watch(20), pytest.raises(TypeError if last else ValueError, match=r"float16|unusable"):
        collective.allreduce(collective.device.zeros(4, np.float16 if last else np.float32))


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize("method", ["allreduce", "reduce", "reduce_scatter", "allgather"])
@pytest.mark.parametrize("ours", [True, False])
def test_lengths_that_differ_are_an_error_not_a_hang(
    collective: Collective, method: str, ours: bool, watch: Watch
) -> None:
    comm = collective.comm
    count = 1000 + (comm.rank == comm.size - 1)
    buffer = collective.allocate(1001, np.float32)[:count] if ours else collective.device.zeros(count, np.float32)
    with watch(20), pytest.raises(ValueError, match=f"rank 0: 1000 x float32.*rank {comm.size - 1}: 1001 x float32"):
        getattr(collective, method)(buffer)
    with watch(20):
        collective.allreduce(collective.device.zeros(3, np.float32))  # it still works afterwards


@pytest.mark.ranks(min=2)
def test_dtypes_that_differ_are_an_error_not_a_hang(collective: Collective, watch: Watch) -> None:
    dtype = np.float64 if collective.comm.rank else np.float32
    with watch(20), pytest.raises(ValueError, match=r"rank 0: 8 x float32; rank 1: 8 x float64"):
        collective.allreduce(collective.device.zeros(8, dtype))


def test_reproducible_means_tree_order(collective: Collective) -> None:
    comm = collective.comm
    if not collective.fixed_order:
        with pytest.raises(UserError, match=r"shared or tree.*--run\.reproducible false"):
            type(collective)(comm, collective.node, reproducible=True, transport=collective.transport)
        return
    fixed = type(collective)(comm, collective.node, reproducible=True, transport=collective.transport)
    for count, dtype in ((7, "float32"), (100_003, "float32"), (50_001, "float64")):
        expected = cases.in_tree_order(comm.size, count, dtype)
        for buffer in (fixed.allocate(count, dtype), collective.device.empty(count, dtype)):
            buffer[:] = cases.values(comm.rank, count, dtype)
            fixed.allreduce(buffer)
            everywhere(comm, (fetch(buffer) == expected).all(), f"{count} x {dtype}")
            buffer[:] = cases.values(comm.rank, count, dtype)
            comm.Barrier()
            fixed.reduce_scatter(buffer)
            own = order.segments(count, comm.size)[comm.rank]
            everywhere(comm, (fetch(buffer[own]) == expected[own]).all(), f"segment of {count} x {dtype}")
    fixed.free()


def test_a_name_that_is_no_file_lists_those_that_are() -> None:
    with pytest.raises(UserError, match=r"collective rings.*mpi, nccl, ring, shared, tree"):
        collectives.get("rings")
