"""Options: the configuration as TOML files and the command line give it, checked before anything is built.

    config = parse()        # python -m mpilm.train --config jobs/gpt-10m.toml --optim.lr 3e-4
"""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Sequence
from difflib import get_close_matches
from itertools import zip_longest
from typing import Any

from mpilm.config import Config, Model, Run
from mpilm.log import HostError, UserError

# A slip of the finger is refused here, before it takes all memory, or hours, to find out.
LIMITS = {"run.steps": 2**40, "run.seed": 2**63, "run.threads": 1024, "data.sequence_length": 2**31,
          "data.global_batch_size": 2**20, "model.layers": 10_000, "model.width": 2**20, "model.hidden": 2**24,
          "model.vocab_size": 2**31, "model.norm_eps": 1.0, "sync.bucket_mib": 2**20, "parallel.chunks": 10_000,
          "optim.warmup_steps": 2**40, "run.time_limit_s": 10**8, "run.stop_before_s": 10**8,
          "run.hang_timeout_s": 10**6, "run.straggler": 10**6, "run.spares": 2**20, "run.max_skipped": 2**40,
          "checkpoint.mtbf_h": 10**6, "checkpoint.keep_last": 2**40, "checkpoint.keep_every": 2**40}
# Options of `sync` that only one kind takes.
TAKEN_BY = {"level": "sharded", "servers": "parameter_server", "staleness": "parameter_server",
            "staleness_rule": "parameter_server", "every": "local_sgd", "local_after": "local_sgd",
            "fragments": "local_sgd", "outer_lr": "local_sgd", "outer_momentum": "local_sgd",
            "save_replicas": "local_sgd"}
# A rank that does not beat for so long may be busy with something else.
SHORTEST_HANG_S = 1.0


def parse(argv: Sequence[str] | None = None, *, prog: str = "python -m mpilm.train", description: str = "") -> Config:
    """Read `--config FILE.toml` and options such as `--optim.lr 1e-3`; later ones win.

    Raises:
        UserError: An unknown key, a value of the wrong type or out of range; the message names it.
        SystemExit: After `--help` (0).
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, usage="%(prog)s [--config FILE.toml] [--SECTION.OPTION VALUE ...]",
                            description=description, parser_mode="toml", exit_on_error=False, allow_abbrev=False)
    parser.add_argument("--config", action="config", help="TOML file with these sections; options after it win. --run, "
                                                          "--data, ... take one with the options of that section.")
    parser.add_class_arguments(Config, as_group=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    _check_files(argv)
    try:
        values = parser.parse_args(argv)
        values.pop("config", None)
        config: Config = Config(**vars(parser.instantiate(values)))
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{_readable(error)}\n  {prog} --help lists what is allowed.") from None
    for section, key in (("run", "dir"), ("run", "resume"), ("data", "path")):
        values = getattr(config, section)
        setattr(values, key, os.path.expanduser(getattr(values, key)))     # no shell has seen what is in a file
    check(config)
    return config


def _check_files(argv: Sequence[str]) -> None:
    """Name the file and the key; jsonargparse, which reads it afterwards, would not."""
    for option, value in zip_longest(argv, argv[1:], fillvalue=""):
        if option.partition("=")[0] == "--config":
            name = option.partition("=")[2] if option.startswith("--config=") else value
            try:
                with open(name, "rb") as file:
                    _check_names(name, tomllib.load(file))
            except OSError as error:
                why = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror
                raise HostError(f"--config {name}: {why}. Give a TOML file, such as those in jobs/.") from None
            except ValueError as error:
                raise HostError(f"--config {name}: not a TOML file ({error}).") from None


def _check_names(name: str, sections: dict[str, Any]) -> None:
    known = Config().to_dict()
    for section, values in sections.items():
        if section not in known:
            raise UserError(f"--config {name}: there is no section [{section}]; there are {', '.join(known)}.")
        if not isinstance(values, dict):
            raise UserError(f"--config {name}: {section} = {values!r} must be a section, [{section}].")
        for key in values:
            if key not in known[section]:
                raise UserError(f"--config {name}: [{section}] has no {key}; it has {', '.join(known[section])}.")


def _readable(error: Exception) -> str:
    """What jsonargparse says, in the words of who typed it."""
    text = " ".join(str(error).split()) or type(error).__name__
    if found := re.search(r'Parser key "([a-z_.]+)": Expected an? (.*?)\. Got value: (.*)', text):
        return f"--{found[1]} {found[3]}: give {_meaning(found[2])}."
    if found := re.search(r'Parser key "([a-z_.]+)": Does.*? Subtypes: \[(.*)\] Errors:.*value: (.*)', text):
        kinds = [_meaning(kind) for kind in re.split(r", (?=<|typing)", found[2])]
        return f"--{found[1]} {found[3]}: give {', or '.join(kinds)}."
    if found := re.match(r"unrecognized arguments: --([^ =]+)", text):
        return text + _alike(found[1])
    return text


def _alike(name: str) -> str:
    """What may have been meant by an option that there is not."""
    known = [f"{section}.{key}" for section, values in Config().to_dict().items() for key in values]
    found = [option for option in known if option.endswith(f".{name}")] or get_close_matches(name, known, n=2)
    return f". Did you mean --{' or --'.join(found)}?" if found else ""


def _meaning(kind: str) -> str:
    if kind.startswith("typing.Literal"):
        choices = kind.removeprefix("typing.Literal")[1:-1].replace("'", "")
        return f"one of {choices}" if "," in choices else choices
    return {"<class 'int'>": "a whole number", "<class 'float'>": "a finite number",
            "<class 'bool'>": "true or false", "<class 'str'>": "a text"}.get(kind, kind)


def check(config: Config) -> None:
    """Values that no layout and no machine could make sense of.

    Raises:
        UserError: Names the option, what was given and what is allowed.
    """
    for option in ("run.steps", "data.sequence_length", "data.global_batch_size", "data.micro_batch_size",
                   "model.layers", "model.width", "model.heads", "run.max_skipped", "parallel.pp", "parallel.cp",
                   "parallel.tp", "parallel.chunks", "log.every", "checkpoint.keep_last", "log.validation_sequences",
                   "sync.rank", "sync.every", "sync.servers"):
        _require(config, option, lambda value: value >= 1, "a whole number from 1 up")
    for option in ("run.seed", "run.threads", "run.spares", "model.kv_heads", "model.hidden", "model.vocab_size",
                   "optim.warmup_steps", "checkpoint.keep_every", "log.validate_every",
                   "sync.compress_warmup", "sync.local_after", "sync.fragments"):
        _require(config, option, lambda value: value >= 0, "a whole number from 0 up")
    _require(config, "run.straggler", lambda value: 1 < value < float("inf"), "a finite number above 1")
    for option in ("run.time_limit_s", "run.stop_before_s"):
        _require(config, option, lambda value: 0 <= value < float("inf"), "seconds from 0 up")
    _require(config, "run.hang_timeout_s", lambda value: value == 0 or value >= SHORTEST_HANG_S,
             f"seconds from {SHORTEST_HANG_S:g} up, or 0 for never")
    for option in ("optim.clip", "optim.weight_decay", "optim.lr"):
        _require(config, option, lambda value: 0 <= value < float("inf"), "a finite number from 0 up")
    for option in ("optim.min_lr", "optim.decay_fraction"):
        _require(config, option, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    for option in ("optim.beta1", "optim.beta2", "sync.outer_momentum"):
        _require(config, option, lambda value: 0 <= value < 1, "a number from 0 to below 1")
    for option in ("optim.eps", "sync.bucket_mib", "sync.outer_lr", "checkpoint.mtbf_h", "model.rope_theta",
                   "model.norm_eps"):
        _require(config, option, lambda value: 0 < value < float("inf"), "a finite number above 0")
    for option, most in LIMITS.items():
        _require(config, option, lambda value, most=most: value <= most, f"at most {most:,}")
    for option in ("run.dir", "run.resume"):
        _require(config, option, lambda value: value.strip() and "\0" not in value, "a name")
    _require(config, "sync.level", lambda value: value in (1, 2, 3), "1, 2 or 3")
    _require(config, "sync.staleness", lambda value: value == "inf" or value >= 0, "a whole number from 0 up, or inf")
    _require(config, "checkpoint.every", lambda value: value == "auto" or 0 <= value <= 2**40,
             "a whole number from 0 to 2**40, or auto")
    _check_time(config.run)
    _check_shape(config.model)
    _check_sharding(config)
    _check_local(config)
    _check_servers(config)
    if config.data.global_batch_size % config.data.micro_batch_size:
        raise UserError(f"--data.micro_batch_size {config.data.micro_batch_size} must divide "
                        f"--data.global_batch_size {config.data.global_batch_size}.")
    if config.sync.compress != "none" and config.run.reproducible:
        raise UserError(f"--sync.compress {config.sync.compress}: each rank rounds what it sends, so their number "
                        "enters the result, which reproducible mode does not allow. Type --run.reproducible false too.")


def idle(config: Config) -> list[str]:
    """What was asked for and does nothing, in words."""
    usual, given = Config(), config.sync
    found = [f"--sync.{key} {getattr(given, key)} is for --sync.kind {kind}, and does nothing under {given.kind}."
             for key, kind in TAKEN_BY.items()
             if given.kind != kind and getattr(given, key) != getattr(usual.sync, key)]
    if config.parallel.pp == 1 and config.parallel.schedule != usual.parallel.schedule:
        found.append(f"--parallel.schedule {config.parallel.schedule} does nothing with --parallel.pp 1.")
    if config.optim.warmup_steps > config.run.steps and config.optim.warmup_steps != usual.optim.warmup_steps:
        found.append(f"--optim.warmup_steps {config.optim.warmup_steps}: the run ends before, after --run.steps "
                     f"{config.run.steps}.")
    return found


def _require(config: Config, option: str, allowed: Any, meaning: str) -> None:
    section, key = option.split(".")
    value = getattr(getattr(config, section), key)
    if not allowed(value):
        raise UserError(f"--{option} {value}: give {meaning}.")


def _check_time(run: Run) -> None:
    if 0 < run.time_limit_s <= run.stop_before_s:
        raise UserError(f"--run.time_limit_s {run.time_limit_s:g}: every job would end after two steps, because "
                        f"it saves and ends --run.stop_before_s {run.stop_before_s:g} before. Give a longer time, or "
                        f"a shorter --run.stop_before_s, such as {run.time_limit_s / 10:g}.")


def _check_sharding(config: Config) -> None:
    if config.sync.kind == "sharded" and config.sync.level > 1 and config.sync.compress != "none":
        raise UserError(f"--sync.compress {config.sync.compress} remembers what it left out of whole gradients, and "
                        f"--sync.level {config.sync.level} keeps none whole: give --sync.level 1, or "
                        "--sync.compress none.")


def _check_local(config: Config) -> None:
    sync = config.sync
    if sync.kind != "local_sgd":
        return
    if config.run.reproducible:
        raise UserError("--sync.kind local_sgd: each replica goes its own way, so their number enters the result, "
                        "which reproducible mode does not allow. Type --run.reproducible false too.")
    if config.parallel.cp > 1:
        raise UserError(f"--parallel.cp {config.parallel.cp}: ranks that share a sequence need each other's gradients "
                        "at every step, which --sync.kind local_sgd does without: give --parallel.cp 1.")
    if sync.fragments > sync.every:
        raise UserError(f"--sync.fragments {sync.fragments}: one fragment is sent after a step, so no more than "
                        f"--sync.every {sync.every} have their turn.")


def _check_servers(config: Config) -> None:
    sync = config.sync
    if sync.kind != "parameter_server":
        return
    if sync.staleness != 0 and config.run.reproducible:
        raise UserError(f"--sync.staleness {sync.staleness}: whose gradient comes first decides the result, which "
                        "reproducible mode does not allow. Type --run.reproducible false too, or --sync.staleness 0.")
    if sync.staleness != 0 and config.checkpoint.every == "auto":
        raise UserError("--checkpoint.every auto: workers with old parameters meet at steps that are known before, so "
                        "give a number of steps, or --sync.staleness 0.")
    if sync.compress == "powersgd":
        raise UserError("--sync.compress powersgd makes sums over all ranks of which servers see only parts: give "
                        "another --sync.compress, or --sync.kind allreduce.")


def _check_shape(model: Model) -> None:
    if model.width % 2:
        raise UserError(f"--model.width {model.width}: give an even number; heads are of even size.")
    if model.width % (2 * model.heads):
        divisors = [n for n in range(1, model.width // 2 + 1) if model.width % (2 * n) == 0]
        raise UserError(f"--model.heads {model.heads} does not divide --model.width {model.width} into heads of even "
                        f"size; with this width it may be {', '.join(map(str, divisors[:12]))}"
                        + " ..." * (len(divisors) > 12) + ".")
    if model.kv_heads and model.heads % model.kv_heads:
        raise UserError(f"--model.kv_heads {model.kv_heads} must divide --model.heads {model.heads}.")
