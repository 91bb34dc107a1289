"""Which checkpoint a run starts from, and whether it is one of this run at all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from mpilm import origin
from mpilm.checkpoint import Reader, differences, newest, verified
from mpilm.config import Config
from mpilm.data._format import read_index
from mpilm.data.shards import check_tokenizer
from mpilm.launch import on_root
from mpilm.log import UserError, say, warn
from mpilm.model import precision
from mpilm.model.shape import Shape
from mpilm.origin import CHECKPOINTS
from mpilm.state import TrainState

MANIFEST = "manifest.json"
# What fixes the meaning of a step: with another value the run would see some data twice and some never.
POSITION = ("data.sequence_length", "data.global_batch_size", "run.seed")


def find(config: Config, comm: Any, *, again: bool = False) -> Reader | None:
    """The checkpoint that `run.resume` asks for; None to start from step 0. Collective over `comm`.

    A path or `never` says where a run begins. When it has begun so, by the same command before, and was cut short, it
    goes on from what it has saved (origin.py); one that had finished begins again.

    Args:
        again: This job has begun already, and ranks of it died.

    Raises:
        UserError: There is none at the path given, or all there are is damaged.
    """
    given, directory = config.run.resume, Path(config.run.dir) / CHECKPOINTS
    begun = on_root(comm, lambda: None if given == "auto" else origin.read(config))
    if begun is None and given != "auto":
        return None if given == "never" else open_run(given, comm)
    found = newest(directory, comm)
    if begun is None:
        return found
    if found is not None and not again:
        if _finished(found):
            reader = None if given == "never" else open_run(given, comm)
            on_root(comm, lambda: origin.path(config).unlink(missing_ok=True))
            return reader
        say(f"--run.resume {given}: this run has begun so, and goes on from its newest checkpoint. To begin again, "
            f"give another --run.dir, or remove {origin.path(config)}.")
    return found if found is not None or begun.checkpoint is None else _begun_from(begun.checkpoint, config, comm)


def _finished(reader: Reader) -> bool:
    """Whether it is the last checkpoint of what was wanted when it was written."""
    return bool(reader.step >= reader.meta.get("config", {}).get("run", {}).get("steps", reader.step + 1))


def _require_a_run_s(reader: Reader) -> None:
    """What comes after reads what a run writes.

    Raises:
        UserError: It is something else, if undamaged.
    """
    meta, tensors = reader.meta, reader.tensors
    try:
        shape, _ = Shape(**meta["shape"]), TrainState(**meta["state"])
        expected = shape.tensors() if shape.layers <= len(tensors) else {"any model so deep": ()}
        wrong = [name for name, whole in expected.items()
                 if f"model.{name}" not in tensors or tensors[f"model.{name}"].shape != whole]
        problem = f"{', '.join(wrong[:4])} of its model is not there, or of another shape" if wrong else ""
        _config(meta["config"]), meta["config"]["data"]["path"], _position(meta["config"])
        meta["data"]["fingerprint"], precision.DTYPES[precision.carrier(meta["arithmetic"]["precision"])]
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        problem = f"its manifest does not say what a run's does ({type(error).__name__}: {error})"
    if problem:
        raise UserError(f"{reader.path}: {problem}. Another program wrote it, or another version of this one. Give "
                        "another --run.dir, or another checkpoint.")


def _begun_from(path: Path, config: Config, comm: Any) -> Reader:
    """The very checkpoint that a run without one of its own began from. Collective over `comm`."""
    if on_root(comm, path.is_dir):
        return verified(path, comm)
    raise UserError(f"{path}: this run began from it and has saved nothing yet, but it is gone. Restore it; or, to "
                    f"begin from what is now at --run.resume {config.run.resume}, remove {origin.path(config)}.")


def make_way(config: Config, reader: Reader | None, comm: Any) -> None:
    """Before a run begins from `reader`, put aside the checkpoints in its directory that are another's, and write down
    what it began from (origin.py). Collective over `comm`.

    Raises:
        UserError: The file system refuses.
    """
    on_root(comm, lambda: origin.begin(config, reader))


def where(config: Config, comm: Any) -> str:
    """From where the same command goes on, in words. Collective over `comm`."""
    found = find(config, comm, again=True)
    if found is None:
        return "Nothing was saved: the same command begins anew, with more ranks."
    return f"Step {found.step} is saved; the same command goes on from there, with more ranks."


def check(reader: Reader, *, shape: dict[str, Any], data: dict[str, Any], config: Config) -> None:
    """Refuse a checkpoint of another model, other data or another order of data.

    Raises:
        UserError: Names every difference; or it is not of a run at all.
    """
    _require_a_run_s(reader)
    meta = reader.meta
    if changed := _changes(meta["config"], config.to_dict()):
        warn(f"Other than in the checkpoint: {', '.join(changed)}. What comes now is not what an undisturbed run would "
             "have done.")
    found = {"model": meta["shape"], "data": {key: meta["data"][key] for key in data},
             "options": _position(meta["config"])}
    expected = {"model": shape, "data": data, "options": _position(config.to_dict())}
    differing = differences(expected, found)
    if differing:
        raise UserError(f"{reader.path} is of another run:\n  " + "\n  ".join(differing)
                        + "\nGive this run the same options, or another --run.dir, or --run.resume never.")


def _changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Options that another value makes another run of, though it may go on: `run.steps` for the learning rate ends."""
    options = [("run", "steps"), ("data", "mask_documents"), *(("optim", key) for key in now["optim"])]
    return [f"--{section}.{key} {before[section][key]} -> {now[section][key]}" for section, key in options
            if before.get(section, {}).get(key, now[section][key]) != now[section][key]]


def _position(config: dict[str, Any]) -> dict[str, Any]:
    return {option: config[option.split(".")[0]][option.split(".")[1]] for option in POSITION}


def open_run(path: str, comm: Any) -> Reader:
    """The checkpoint at `path`, or the newest of the run there. Collective over `comm`.

    Raises:
        UserError: There is none.
    """
    given = Path(path)
    on_root(comm, lambda: _require_run(given))
    reader = newest(given / CHECKPOINTS, comm) if (given / CHECKPOINTS).is_dir() else verified(given, comm)
    if reader is None:
        raise UserError(f"{path}: no checkpoint there yet. Give another run, or wait for its first one.")
    return reader


def _require_run(path: Path) -> None:
    """Only rank 0 looks, so that all ranks give the same answer."""
    if not (path / CHECKPOINTS).is_dir() and not (path / MANIFEST).is_file():
        why = "no checkpoint there" if path.is_dir() else "there is no such directory"
        raise UserError(f"{path}: {why}. Give a run directory or one of its {CHECKPOINTS}/step-*.")


def config_of(reader: Reader) -> Config:
    """The configuration that a checkpoint was written under, as far as this version has the same options.

    Raises:
        UserError: It is not of a run.
    """
    _require_a_run_s(reader)
    return _config(reader.meta["config"])


def _config(written: dict[str, Any]) -> Config:
    return Config(**{name: replace(section, **{key: value for key, value in written.get(name, {}).items()
                                               if hasattr(section, key)})
                     for name, section in vars(Config()).items()})


def require_tokenizer(reader: Reader, path: str) -> None:
    """Refuse a dataset whose tokens are not those that the model of a checkpoint learned.

    Raises:
        UserError: They are not; or there is no dataset at `path`.
    """
    folder = Path(path)
    try:
        index = read_index(folder)
        check_tokenizer(folder, index)
    except UserError as error:
        raise UserError(f"{error}\nThe dataset of {reader.path} was at {reader.meta['config']['data']['path']}; "
                        "--data.path says where it is now.") from None
    learned = reader.meta["data"].get("tokenizer", index.tokenizer_sha256)
    if index.tokenizer_sha256 != learned or index.vocab_size > reader.meta["shape"]["vocab_size"]:
        raise UserError(f"{folder} was encoded with another tokenizer than the data that {reader.path} learned: the "
                        "same numbers mean other words. Give a dataset that was encoded with the same one.")
