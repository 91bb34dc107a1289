"""Validation loss of a trained model: mpirun -np 2 python -m mpilm.evaluate RUN_OR_CHECKPOINT [--data.path DIR]."""

from __future__ import annotations

import argparse
import math

from mpilm import launch, startup
from mpilm.log import UserError, say


def main() -> None:
    """Read a checkpoint, measure, print."""
    parser = argparse.ArgumentParser(prog="python -m mpilm.evaluate", description=__doc__)
    parser.add_argument("path", help="run directory or checkpoint")
    parser.add_argument("--data.path", dest="data", default="", help="dataset; default: the one it was trained on")
    parser.add_argument("--sequences", type=int, default=10**9, help="at most so many; default: all")
    parser.add_argument("--device", choices=("auto", "cuda", "host"), default="auto", help="as --run.device of a run")
    options = parser.parse_args()
    if options.sequences < 1:
        raise UserError(f"--sequences {options.sequences}: give a number from 1 up.")
    with launch.session(device=options.device) as world:
        with startup.loading():
            import torch

            from mpilm import alike, assemble, resume, trained
            from mpilm.parallel import pipeline

        torch.set_num_threads(world.threads)
        reader = resume.open_run(options.path, world.comm)
        config = resume.config_of(reader)
        config.data.path = options.data or config.data.path
        config.log.validation_sequences = options.sequences
        resume.require_tokenizer(reader, config.data.path)
        validation = assemble.validation(config, pipeline.alone(trained.model(reader, world.device)), world.comm)
        alike.require_dataset(world.comm, config.data.path, validation.dataset.fingerprint)
        loss = validation.loss()
        of = f"of {validation.of:,} " if validation.of > validation.tokens else ""
        say(f"{reader.path}: validation loss {loss:.4f} nats per token, perplexity {perplexity(loss):.2f}, over "
            f"{validation.tokens:,} {of}tokens")


def perplexity(loss: float) -> float:
    """e to the loss; infinite where a model that went astray is beyond all numbers."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


if __name__ == "__main__":
    launch.command(main)
