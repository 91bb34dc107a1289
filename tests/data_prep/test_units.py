"""Units cover every byte once, whatever their size; dealing is even."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep._sources import Source
from data_prep._units import MIB, Unit, deal, divide, unit_size
from mpilm.log import UserError

pytestmark = pytest.mark.serial


def source(number, size, kind="text", packing=""):
    return Source(f"{number:04d}", kind, packing, size, 0)


@given(sizes=st.lists(st.integers(0, 500), min_size=2, max_size=40), unit_bytes=st.integers(1, 300))
def test_every_byte_once(sizes, unit_bytes):
    sources = [source(number, size, "jsonl" if number % 2 else "text") for number, size in enumerate(sizes)]
    units = divide(sources, validation=0.1, unit_bytes=unit_bytes)
    assert [unit.number for unit in units] == list(range(len(units)))
    covered = {item.path: 0 for item in sources}
    for unit in units:
        for part in unit.parts:
            assert part.start == covered[part.source.path]
            covered[part.source.path] = part.stop
            assert part.size == part.stop - part.start <= max(unit_bytes, 1)
    assert covered == {item.path: item.size for item in sources}
    assert all(unit.size < 2 * unit_bytes + 500 for unit in units)


def test_small_files_share_a_unit():
    units = divide([source(number, 10) for number in range(100)], validation=0, unit_bytes=200)
    assert [len(unit.parts) for unit in units] == [20] * 5


def test_a_packed_file_is_not_entered():
    units = divide([source(0, 5000, packing="gzip"), source(1, 10)], validation=0, unit_bytes=100)
    assert [(part.start, part.stop) for unit in units for part in unit.parts] == [(0, -1), (0, 10)]


def test_a_lone_text_is_divided_by_place():
    units = divide([source(0, 1000)], validation=0.1, unit_bytes=300)
    parts = [part for unit in units for part in unit.parts]
    assert [part.split for part in parts] == ["train"] * 3 + ["validation"]
    assert parts[-1].document == (900, 1000)
    assert not divide([source(0, 1000)], validation=0)[0].parts[0].split


def test_a_broken_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1" + b"x" * 100)
    with pytest.raises(UserError, match=r"x\.parquet: not a Parquet file"):
        divide([Source(str(path), "parquet", "", 104, 0)], validation=0, unit_bytes=10)


@given(sizes=st.lists(st.integers(0, 1000), max_size=60), ranks=st.integers(1, 9))
def test_dealing(sizes, ranks):
    units = [Unit(number, divide([source(number, size)], validation=0, unit_bytes=2000)[0].parts)
             for number, size in enumerate(sizes)]
    hands = deal(units, ranks)
    assert sorted(unit.number for hand in hands for unit in hand) == list(range(len(units)))
    loads = [sum(unit.size for unit in hand) for hand in hands]
    assert max(loads) - min(loads) <= max(sizes, default=0)


def test_unit_size():
    assert unit_size(0) == MIB
    assert unit_size(1 << 30) == 4 * MIB
    assert unit_size(1 << 35) == 32 * MIB
    assert unit_size(10 << 40) // MIB == 2560
