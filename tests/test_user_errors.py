"""Garbage in: the culprit by name, exit code 2 on all ranks, no traceback, no hang."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sched
import shlex

import h5py
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mpilm import assemble, menu, options, sync, train
from mpilm.config import Config
from mpilm.data.shards import Dataset
from mpilm.lock import locked
from mpilm.log import UserError
from tests import datasets
from tests.helpers import everywhere
from tests.small_jobs import arguments, train_here

OPTION_NAMES = [f"{section}.{key}" for section, values in Config().to_dict().items() for key in values]


@pytest.mark.serial
@given(st.sampled_from(OPTION_NAMES), st.text(st.characters(codec="ascii", exclude_characters="\0"), max_size=12))
@example("run.steps", "-1")
@example("model.heads", "0")
@example("optim.lr", "nan")
@example("sync.bucket_mib", "inf")
@example("data.micro_batch_size", "3")
def test_any_text_for_any_option_is_taken_or_refused(option, text):
    """Nothing but a configuration or an error that tells."""
    with contextlib.suppress(UserError):
        options.parse([f"--{option}={text}"])


@pytest.mark.serial
@given(st.binary(max_size=60))
@example(b"[run]\nsteps = 'many'\n")
@example(b"[run]\nsteps = 3.5\n")
@example(b"[nonsense]\nx = 1\n")
@example(b"run = 3\n")
def test_any_file_for_a_configuration_is_taken_or_refused(tmp_path, content):
    """TOML or not."""
    path = tmp_path / "run.toml"
    path.write_bytes(content)
    with contextlib.suppress(UserError):
        options.parse(["--config", str(path)])


def test_a_configuration_survives_its_own_text(tmp_path):
    """What is written into the run directory reads back equal."""
    strange = 'a "strange"\\näme\U0001f600\x7f'
    given_config = options.parse(["--run.dir", strange, "--optim.lr", "1e-5", "--sync.bucket_mib", "2"])
    path = tmp_path / "run.toml"
    path.write_text(given_config.to_toml())
    assert options.parse(["--config", str(path)]) == given_config


@pytest.mark.serial
def test_a_file_knows_the_home(tmp_path, monkeypatch):
    """No shell has seen it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.toml").write_text('[run]\ndir = "~/x"\n')
    assert options.parse(["--config", str(tmp_path / "run.toml")]).run.dir == f"{tmp_path}/x"


@pytest.mark.serial
def test_what_does_nothing_is_told():
    """As the classes have it that take it."""
    taken = {name: kind for kind in ("sharded", "local_sgd") for name in sync.get(kind).OPTIONS}
    assert taken.items() <= options.TAKEN_BY.items()
    told = options.idle(options.parse(["--sync.level", "3", "--parallel.schedule", "zb", "--sync.every", "4"]))
    assert [text.split()[0] for text in told] == ["--sync.level", "--sync.every", "--parallel.schedule"]
    assert not options.idle(options.parse(["--sync.level", "3", "--sync.kind", "sharded"]))


@pytest.mark.serial
@pytest.mark.parametrize("package", ["mpilm.sync", "mpilm.sync.compress", "mpilm.comm.collectives"])
def test_what_is_on_a_menu_is_there(package):
    """Every choice that messages offer."""
    assert all(menu.get(package, name, option="x") for name in menu.names(package))


@pytest.mark.serial
@pytest.mark.parametrize(("argv", "named"), [
    (["--run.stepz", "3"], "run.stepz"),
    (["--model.heads", "5"], "model.heads 5"),
    (["--data.global_batch_size", "10", "--data.micro_batch_size", "4"], "micro_batch_size 4"),
    (["--config", "nowhere.toml"], "nowhere.toml"),
    (["--config", "/"], "--config /: Is a directory"),
    (["--run.steps", "1e3"], "run.steps 1000.0: give a whole number"),
    (["--run.reproducible", "maybe"], "run.reproducible maybe: give true or false"),
    (["--optim.schedule", "linear"], "optim.schedule linear: give one of cosine, wsd"),
    (["--run.threads", "100000"], "run.threads 100000: give at most 1,024"),
    (["--model.width", "10000000001"], "model.width 10000000001"),
    (["--model.width", "65"], "model.width 65: give an even number"),
    (["--model.layers", "100000000"], "model.layers 100000000"),
    (["--data.global_batch_size", str(2**40)], "data.global_batch_size"),
    (["--optim.beta1", "1"], "optim.beta1 1.0: give a number from 0 to below 1"),
    (["--run.dir", " "], "run.dir"),
    (["--run.hang_timeout_s", "1e12"], "run.hang_timeout_s 1000000000000.0: give at most 1,000,000"),
    (["--run.hang_timeout_s", "0.001"], "run.hang_timeout_s 0.001: give seconds from 1 up, or 0 for never"),
    (["--checkpoint.every", "auto", "--checkpoint.mtbf_h", "1e308"], "checkpoint.mtbf_h 1e.308: give at most"),
    (["--checkpoint.every", str(2**70)], "checkpoint.every 1180591620717411303424"),
    (["--run.time_limit_s", "1e300"], "run.time_limit_s 1e.300: give at most"),
    (["--run.time_limit_s", "20"], r"every job would end after two steps.*--run\.stop_before_s, such as 2\."),
    (["--run.resume", ""], "run.resume"),
    (["--checkpoint.every", "x"], "checkpoint.every x: give a whole number, or auto"),
    (["--lr", "1"], r"--lr 1\. Did you mean --optim\.lr\?"),
    (["--model.layer", "3"], r"Did you mean --model\.layers"),
])
def test_the_culprit_is_named(argv, named):
    """What was given is in the message."""
    with pytest.raises(UserError, match=named):
        options.parse(argv)


@pytest.mark.serial
@pytest.mark.parametrize(("content", "named"), [
    (b"[run]\nfoo = 3\n", r"\[run\] has no foo; it has dir, steps"),
    (b"[nonsense]\nx = 1\n", r"no section \[nonsense\]; there are run, data"),
    (b"run = 3\n", "run = 3 must be a section"),
    (b"\xff", "not a TOML file"),
])
def test_a_file_with_a_mistake_is_named(tmp_path, content, named):
    """And so is the key."""
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"mine.toml: .*{named}"):
        options.parse([f"--config={path}"])


@pytest.fixture
def data(comm, tmp_path_all):
    """A small dataset that all ranks see."""
    return datasets.for_all(comm, tmp_path_all / "data")


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize(("changes", "named"), [
    ({"data.path": "nowhere"}, "nowhere"),
    ({"data.micro_batch_size": 8}, "micro-batches"),
    ({"model.vocab_size": 100}, "model.vocab_size 100"),
    ({"run.resume": "nowhere"}, "nowhere: there is no such directory. Give a run directory"),
    ({"run.resume": "/tmp"}, "/tmp: no checkpoint there"),
    ({"model.width": 2**20}, "GiB of memory"),
    ({"run.dir": "/dev/null/run"}, "/dev/null"),
    ({"parallel.tp": 2, "model.heads": 1}, "parallel.tp 2"),
    ({"parallel.pp": 3}, "--parallel.pp may be 1 or 2"),
    ({"parallel.pp": 2, "model.tied_embeddings": "true"}, "tied_embeddings"),
    ({"parallel.pp": 2, "parallel.split": "1,1"}, "deals 2 blocks"),
    ({"parallel.schedule": "2f2b"}, "gpipe, 1f1b, interleaved, zb"),
    ({"sync.collective": "pigeon"}, "pigeon"),
    ({"run.spares": 1, "parallel.pp": 7}, "--parallel.pp 7"),
])
def test_what_cannot_work_is_refused_on_all_ranks(data, tmp_path_all, changes, named):
    """By the name of what was given."""
    with pytest.raises(UserError, match=re.escape(named)):
        train_here(data, tmp_path_all / "run", **changes)


@pytest.mark.serial
def test_a_job_that_cannot_work_says_why_and_ends(run_mpi, data, tmp_path):
    """When it turns out; without a traceback, and with an exit code of its own."""
    diverging = {"optim.lr": 1e30, "optim.warmup_steps": 0, "run.steps": 30, "run.max_skipped": 3}
    result = run_mpi(0, ["-m", "mpilm.train", *arguments(data, tmp_path / "run", **diverging)])
    said = result.stdout + result.stderr
    assert result.rc == 2, said
    assert said.count("3 times in a row") == 1 and "Traceback" not in said, said


@pytest.mark.ranks(max=1)
def test_what_diverged_takes_no_place_of_a_checkpoint_from_before(data, tmp_path):
    """Who lowers the learning rate goes on from there. A run that ends astray says so, and that is not our bug."""
    run, going = tmp_path / "run", {"run.steps": 4, "checkpoint.every": 1, "checkpoint.keep_last": 2}
    train_here(data, run, **going)
    before = sorted(path.name for path in (run / "checkpoints").iterdir())
    with pytest.raises(UserError, match="Nothing was saved meanwhile"):
        train_here(data, run, **going | {"run.steps": 30, "optim.lr": 1e30, "optim.warmup_steps": 0,
                                         "run.max_skipped": 4})
    after = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert before[-1] in after and len(after) == 2 and int(after[-1][-8:]) == 5, (before, after)
    train_here(data, tmp_path / "astray", **{"run.steps": 3, "optim.lr": 1e38, "optim.weight_decay": 1.0,
                                             "optim.warmup_steps": 0})
    assert "its training went astray" in (tmp_path / "astray" / "log.txt").read_text()


@pytest.mark.serial
def test_a_second_job_is_kept_out_of_a_run_directory(data, tmp_path, monkeypatch):
    """Two jobs would write the same checkpoints over each other's."""
    monkeypatch.setattr(train, "WAIT_S", 0.5)
    run = tmp_path / "run"
    run.mkdir()
    with locked(run / ".lock", wait_s=0, otherwise=""), \
         pytest.raises(UserError, match=rf"another process is writing there \(process {os.getpid()} on"):
        train_here(data, run)
    assert not (run / "metrics.jsonl").exists() and not (run / "log.txt").exists()
    train_here(data, run)


@pytest.mark.ranks(min=2, max=2)
def test_a_checkpoint_of_another_run_is_refused(comm, data, tmp_path_all):
    """Another model, another seed: every difference is named; `never` puts the old ones aside."""
    run = tmp_path_all / "run"
    train_here(data, run)
    for changes, named in [({"model.width": 64}, "width"), ({"run.seed": 9}, "run.seed")]:
        with pytest.raises(UserError, match=named):
            train_here(data, run, **{"run.steps": 4} | changes)
    if comm.rank == 0:
        data.rename(tmp_path_all / "moved")
    comm.Barrier()
    train_here(tmp_path_all / "moved", run, **{"run.steps": 4})     # the same data in another place is the same data
    everywhere(comm, "--run.steps 2 -> 4" in (run / "log.txt").read_text())
    train_here(tmp_path_all / "moved", run, **{"run.seed": 9, "run.resume": "never"})
    everywhere(comm, (run / "checkpoints.old-1").is_dir() and (run / "metrics.old-1.jsonl").is_file())
    everywhere(comm, json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"] == 2)


@pytest.mark.ranks(min=2, max=2)
def test_ranks_that_were_given_other_options(comm, data, tmp_path_all):
    """A mixture would train, and be saved as good."""
    with pytest.raises(UserError, match=r"(?s)rank 1: the options are not .*optim\.lr: expected 0\.5"):
        train_here(data, tmp_path_all / "run", **{"optim.lr": 0.5 / (1 + comm.rank)})


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_token_that_the_vocabulary_does_not_have(comm, tmp_path_all, split):
    """Found before the first step, though none of the two steps would draw it."""
    mine = tmp_path_all / "tokens"
    if comm.rank == 0:
        datasets.small(mine)
        with h5py.File(mine / f"{split}-00000.h5", "r+") as file:
            file["tokens"][-1] = datasets.VOCAB_SIZE
    comm.Barrier()
    with pytest.raises(UserError, match=rf"{split}-00000.h5: holds token 257, but the vocabulary has 257 entries"):
        train_here(mine, tmp_path_all / "run")
    assert not (tmp_path_all / "run" / "metrics.jsonl").exists()


@pytest.mark.ranks(min=2, max=2)
def test_disks_of_nodes_that_hold_other_datasets(comm, data, tmp_path_all, monkeypatch):
    """Of one tokenizer, such as two states of a corpus: nothing else would tell."""
    mine = datasets.small(tmp_path_all / f"disk{comm.rank}", validation=(shlex, sched)[comm.rank])
    monkeypatch.setattr(assemble, "open_split", lambda config, split: Dataset.open(mine, split=split))
    with pytest.raises(UserError, match=r"rank 1: .* is another dataset than on rank 0"):
        train_here(data, tmp_path_all / "run")
