"""Options: the configuration as TOML files and the command line give it, checked before anything is built.

    config = parse()        # python -m mpilm.train --config jobs/gpt-10m.toml --optim.lr 3e-4
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from mpilm.config import Config, Model
from mpilm.log import UserError


def parse(argv: Sequence[str] | None = None, *, prog: str = "python -m mpilm.train", description: str = "") -> Config:
    """Read `--config FILE.toml` and options such as `--optim.lr 1e-3`; later ones win.

    Raises:
        UserError: An unknown key, a value of the wrong type or out of range; the message names it.
        SystemExit: After `--help` (0).
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(prog=prog, description=description, parser_mode="toml", exit_on_error=False)
    parser.add_argument("--config", action="config", help="TOML file with these sections; options after it win.")
    parser.add_class_arguments(Config, as_group=False)
    argv = list(sys.argv[1:] if argv is None else argv)
    _require_files(argv)
    try:
        values = parser.parse_args(argv)
        values.pop("config", None)
        config: Config = Config(**vars(parser.instantiate(values)))
    except (ArgumentError, TypeError, ValueError, OSError) as error:
        raise UserError(f"{_readable(error)}\n  {prog} --help lists what is allowed.") from None
    check(config)
    return config


def _require_files(argv: Sequence[str]) -> None:
    """jsonargparse would read the name of a missing file as TOML and complain about its syntax."""
    for option, value in zip_longest(argv, argv[1:], fillvalue=""):
        name = option.partition("=")[2] if option.startswith("--config=") else value
        if option.partition("=")[0] == "--config" and not os.path.isfile(name):
            raise UserError(f"--config {name}: there is no such file.")


def _readable(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return "\n  ".join(lines) or type(error).__name__


def check(config: Config) -> None:
    """Values that no layout and no machine could make sense of.

    Raises:
        UserError: Names the option, what was given and what is allowed.
    """
    for option in ("run.steps", "data.sequence_length", "data.global_batch_size", "data.micro_batch_size",
                   "model.layers", "model.width", "model.heads", "run.max_skipped", "parallel.pp", "parallel.cp",
                   "parallel.tp", "parallel.chunks", "log.every", "checkpoint.keep_last", "log.validation_sequences"):
        _require(config, option, lambda value: value >= 1, "a whole number from 1 up")
    for option in ("run.seed", "run.threads", "model.kv_heads", "model.hidden", "model.vocab_size",
                   "optim.warmup_steps", "checkpoint.every", "checkpoint.keep_every", "log.validate_every"):
        _require(config, option, lambda value: value >= 0, "a whole number from 0 up")
    for option in ("optim.clip", "optim.weight_decay", "optim.lr"):
        _require(config, option, lambda value: 0 <= value < float("inf"), "a finite number from 0 up")
    for option in ("optim.beta1", "optim.beta2", "optim.min_lr", "optim.decay_fraction"):
        _require(config, option, lambda value: 0 <= value <= 1, "a number from 0 to 1")
    for option in ("optim.eps", "sync.bucket_mib", "model.rope_theta", "model.norm_eps"):
        _require(config, option, lambda value: 0 < value < float("inf"), "a finite number above 0")
    _check_shape(config.model)
    if config.data.global_batch_size % config.data.micro_batch_size:
        raise UserError(f"--data.micro_batch_size {config.data.micro_batch_size} must divide "
                        f"--data.global_batch_size {config.data.global_batch_size}.")


def _require(config: Config, option: str, allowed: Any, meaning: str) -> None:
    section, key = option.split(".")
    value = getattr(getattr(config, section), key)
    if not allowed(value):
        raise UserError(f"--{option} {value}: give {meaning}.")


def _check_shape(model: Model) -> None:
    if model.width % (2 * model.heads):
        divisors = [n for n in range(1, model.width // 2 + 1) if model.width % (2 * n) == 0]
        raise UserError(f"--model.heads {model.heads} does not divide --model.width {model.width} into heads of even "
                        f"size; with this width it may be {', '.join(map(str, divisors[:12]))} ...")
    if model.kv_heads and model.heads % model.kv_heads:
        raise UserError(f"--model.kv_heads {model.kv_heads} must divide --model.heads {model.heads}.")
