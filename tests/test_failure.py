"""Errors that one rank sees become errors of all."""

from __future__ import annotations

import pytest

from mpilm.failure import RankError, agree, on_root
from mpilm.log import UserError


def test_on_root_tells_all(comm):
    assert on_root(comm, lambda: {"rank": comm.rank}) == {"rank": 0}


def test_on_root_raises_a_users_mistake_everywhere(comm):
    def fail() -> None:
        raise UserError("no such file: x")

    with pytest.raises(UserError, match=r"^no such file: x$"):
        on_root(comm, fail)


def test_on_root_raises_a_bug_everywhere(comm):
    with pytest.raises(ZeroDivisionError if comm.rank == 0 else RankError) as caught:
        on_root(comm, lambda: 1 // 0)
    if comm.rank > 0:
        assert "ZeroDivisionError" in str(caught.value)
        assert caught.value.origin == 0


def test_agree_is_silent_when_all_is_well(comm):
    agree(comm, None)


def test_agree_names_the_rank(comm):
    last = comm.size - 1
    expected = "disk full" if comm.size == 1 else rf"^rank {last}: disk full$"
    with pytest.raises(UserError, match=expected):
        agree(comm, UserError("disk full") if comm.rank == last else None)


def test_agree_says_once_what_all_say(comm):
    with pytest.raises(UserError, match=r"^the same$"):
        agree(comm, UserError("the same"))


def test_agree_takes_an_oserror_for_a_users_mistake(comm):
    with pytest.raises(UserError, match="No space left"):
        agree(comm, OSError(28, "No space left on device") if comm.rank == 0 else None)


def test_agree_keeps_a_bug_a_bug(comm):
    with pytest.raises(KeyError if comm.rank == 0 else RankError):
        agree(comm, KeyError("k") if comm.rank == 0 else None)
