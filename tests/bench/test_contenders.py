"""The menu of the training benchmark: names, what a file must have, who gets which cores and which environment."""

import importlib

import pytest

from mpilm import startup
from mpilm.bench import _contenders
from mpilm.bench._child import share
from mpilm.bench._contenders import CASES, mpilm
from mpilm.bench._jobs import environment
from mpilm.log import UserError

PEERS = ["ddp", "ddp-compile", "fsdp2", "single", "single-compile"]


def test_names_are_those_people_ask_for():
    names = _contenders.names()
    assert names[:3] == ["mpilm", "mpilm-reproducible", "mpilm-slots"]
    assert set(names[3:]) == {*PEERS, *(f"{name}-tuned" for name in PEERS)}


@pytest.mark.parametrize("file", _contenders.files())
def test_every_file_keeps_to_the_interface(file):
    module = importlib.import_module(f"mpilm.bench._contenders.{file}")
    assert module.LAYOUT in {"peers", "one", "mpi"}
    assert all("-" not in variant for variant in module.VARIANTS)
    assert callable(module.contender)


def test_a_name_is_taken_apart():
    who = _contenders.parse("ddp-compile-tuned")
    assert (who.file, who.variants, who.tuned, who.ours) == ("ddp", {"compile"}, True, False)
    assert _contenders.parse("mpilm-reproducible").ours


def test_slots_are_those_of_reproducible_mode():
    """So that only the bits are between them."""
    by = [mpilm.configuration(CASES["tiny"], reproducible=mode, micro_batches=mpilm.SLOTS) for mode in (True, False)]
    assert by[0].data == by[1].data
    assert [config.run.reproducible for config in by] == [True, False]


@pytest.mark.parametrize("name", ["", "horovod", "ddp-reproducible", "mpilm-tuned", "_llama"])
def test_an_unknown_name_is_told_with_those_there_are(name):
    with pytest.raises(UserError, match=r"there are mpilm, .*single-compile-tuned"):
        _contenders.parse(name)


@pytest.mark.parametrize(("cores", "size", "expected"), [
    ((0, 1), 2, [(0,), (1,)]),
    ((0, 1), 1, [(0, 1)]),
    ((0, 2, 4, 6, 8), 2, [(0, 2), (4, 6)]),
    ((3,), 2, [(3,), (3,)]),
    ((0, 1), 3, [(0,), (1,), (0,)]),
])
def test_cores_are_dealt_out_evenly(cores, size, expected):
    assert [share(cores, rank, size) for rank in range(size)] == expected


def test_a_contender_does_not_see_our_launcher_threads_or_malloc():
    ours = {"PATH": "bin", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_RANK": "0", "PMI_RANK": "0", "SLURM_NTASKS": "2",
            "MKL_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "GLIBC_TUNABLES": "x", "MALLOC_ARENA_MAX": "1"}
    plain = environment(ours, threads=2, tuned=False)
    assert plain["PATH"] == "bin"
    assert plain["OMP_NUM_THREADS"] == "2"
    assert not {*ours, "GLIBC_TUNABLES"} & set(plain) - {"PATH", "OMP_NUM_THREADS"}
    tuned = environment(ours, threads=2, tuned=True)
    assert tuned == plain | {"GLIBC_TUNABLES": startup.MALLOC}
