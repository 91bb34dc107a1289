"""Matrices told by their strongest directions: against a loop of plain matrix products, and as a sum over ranks."""

from __future__ import annotations

import numpy as np
import pytest
from mpi4py import MPI

from mpilm.comm import collectives
from mpilm.comm.node import Node
from mpilm.comm.p2p import Traffic
from mpilm.log import UserError
from mpilm.options import parse
from mpilm.sync._layout import Parameter, lay_out
from mpilm.sync.compress import powersgd
from tests.helpers import everywhere, same_everywhere

RANK = 3
PARAMETERS = [Parameter("wide", 40 * 300, True, rows=40), Parameter("bias", 300, True),
              Parameter("tall", 500 * 20, True, rows=500), Parameter("small", 12, True, rows=3)]
LAYOUT, = lay_out(PARAMETERS, 1 << 20, owners=1)
MEMBERS = {member.name: member for member in LAYOUT.members}


@pytest.fixture(params=["ring", "shared"])
def collective(request, comm):
    """Factors are summed by any of them."""
    node = Node.build(comm)
    made = collectives.get(request.param)(comm, node)
    yield made
    made.free()
    node.free()


def draw(*seed):
    """A buffer of normal values in the members, and nothing between them."""
    random, buffer = np.random.default_rng(seed), np.zeros(LAYOUT.count, np.float32)
    for member in LAYOUT.members:
        buffer[member.start:member.start + member.count] = random.normal(size=member.count)
    return buffer


def matrix(buffer, name):
    """A member as the matrix that it is, in float64."""
    member = MEMBERS[name]
    return np.asarray(buffer[member.start:member.start + member.count], np.float64).reshape(member.rows, -1)


def test_it_is_power_iteration_with_error_feedback(collective, comm: MPI.Comm):
    """Three sums beside NumPy's, with the residuals of all ranks."""
    factors = powersgd.Factors(collective, LAYOUT, rank=RANK)
    warm = {name: right.numpy().astype(np.float64) for name, right in
            zip([member.name for member in factors.matrices], factors.warm, strict=True)}
    assert set(warm) == {"wide", "tall"}, "others would not be smaller"
    lost = {name: [0.0] * comm.size for name in warm}
    for step in range(3):
        buffer = draw(step, comm.rank)
        factors.reduce(buffer)
        same_everywhere(comm, buffer)
        given = [draw(step, rank) for rank in range(comm.size)]
        for name in ("bias", "small"):
            exact = sum(matrix(one, name) for one in given)
            everywhere(comm, np.allclose(matrix(buffer, name), exact, atol=1e-5), name)
        for name in warm:
            whole = [matrix(one, name) + rest for one, rest in zip(given, lost[name], strict=True)]
            left, _ = np.linalg.qr(sum(whole) @ warm[name].T)
            lost[name] = [one - left @ (left.T @ one) for one in whole]
            expected = left @ (left.T @ sum(whole))
            # The columns of a QR decomposition may have other signs than ours, and nothing depends on them.
            everywhere(comm, np.allclose(matrix(buffer, name), expected, atol=1e-3), f"{name}, step {step}")
            warm[name] = orthonormal(sum(whole) @ warm[name].T).T @ sum(whole)
            everywhere(comm, np.allclose(matrix(factors.lost, name), lost[name][comm.rank], atol=1e-3), "residual")


def orthonormal(columns):
    """By our own function."""
    rows = np.ascontiguousarray(columns.T).astype(np.float32)
    powersgd.orthonormalize(rows)
    return rows.T.astype(np.float64)


def test_a_matrix_of_so_low_a_rank_arrives_whole(collective, comm: MPI.Comm):
    """From the second sum on at the latest: nothing is left to lose."""
    factors = powersgd.Factors(collective, LAYOUT, rank=RANK)
    random = np.random.default_rng(1)
    left, right = random.normal(size=(40, RANK)), random.normal(size=(RANK, 300))
    for _ in range(2):
        buffer = np.zeros(LAYOUT.count, np.float32)
        member = MEMBERS["wide"]
        buffer[member.start:member.start + member.count] = (left @ right).reshape(-1)
        factors.reduce(buffer)
    everywhere(comm, np.allclose(matrix(buffer, "wide"), comm.size * left @ right, atol=1e-3))
    everywhere(comm, float(factors.lost.abs().max()) < 1e-3)


def test_what_is_sent(comm: MPI.Comm):
    """The factors of two matrices, and the others as they are."""
    node = Node.build(comm)
    ring = collectives.get("ring")(comm, node)
    factors, before = powersgd.Factors(ring, LAYOUT, rank=RANK), Traffic.sent
    factors.reduce(draw(1, comm.rank))
    sent = comm.allreduce(Traffic.sent - before)
    values = RANK * (40 + 300 + 500 + 20) + 300 + 12
    everywhere(comm, sent == 2 * (comm.size - 1) * 4 * values, f"{sent}")
    ring.free()
    node.free()


def test_what_is_not_finite_is_told_and_does_not_stay(collective, comm: MPI.Comm):
    """The next sum is that of new residuals."""
    factors, fresh = (powersgd.Factors(collective, LAYOUT, rank=RANK) for _ in range(2))
    poisoned = draw(1, comm.rank)
    if comm.rank == comm.size - 1:
        poisoned[MEMBERS["tall"].start + 7] = np.inf
    with np.errstate(invalid="ignore"):
        factors.reduce(poisoned)
    one, other = draw(2, comm.rank), draw(2, comm.rank)
    factors.reduce(one)
    fresh.reduce(other)
    everywhere(comm, not np.isfinite(poisoned).all() and np.array_equal(one, other), "as if it had not been")


def test_nothing_does_not_stay_nothing(collective, comm: MPI.Comm):
    """A matrix of zeros leaves no dead directions behind."""
    factors = powersgd.Factors(collective, LAYOUT, rank=RANK)
    factors.reduce(empty := np.zeros(LAYOUT.count, np.float32))
    everywhere(comm, not empty.any())
    buffer = draw(3, comm.rank)
    factors.reduce(buffer)
    everywhere(comm, np.linalg.matrix_rank(matrix(buffer, "wide"), tol=1e-3) == RANK)


@pytest.mark.serial
@pytest.mark.parametrize("rows", [np.zeros((3, 50)), np.ones((3, 50)), 1e-30 * np.eye(3, 50) + 1e-30,
                                  np.full((2, 50), 1e38)], ids=["zeros", "ones", "tiny", "huge"])
def test_orthonormal_rows(rows):
    """Of any size; those that add nothing are zero."""
    rows = rows.astype(np.float32)
    independent = np.linalg.matrix_rank(rows / max(np.abs(rows).max(), 1e-38))
    powersgd.orthonormalize(rows)
    products = (rows @ rows.T).astype(np.float64)
    assert np.allclose(products, np.diag(np.diag(products)), atol=1e-5)
    assert np.allclose(sorted(np.diag(products)), [0] * (len(rows) - independent) + [1] * independent, atol=1e-5)


@pytest.mark.serial
def test_a_rank_below_one_is_refused():
    """It would send nothing."""
    with pytest.raises(UserError, match=r"sync\.rank 0: give a whole number from 1 up"):
        parse(["--sync.rank", "0"])


@pytest.mark.serial
def test_who_has_no_smaller_factors():
    """Vectors, and matrices of less than the rank."""
    assert not any(powersgd.smaller(MEMBERS[name], RANK) for name in ("bias", "small"))
    assert powersgd.smaller(MEMBERS["wide"], 35)
    assert not powersgd.smaller(MEMBERS["wide"], 36)
