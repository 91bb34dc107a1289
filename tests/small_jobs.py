"""Jobs of `python -m mpilm.train` that take a second: as real jobs, or in the process of the test.

    run_mpi(2, ["-m", "mpilm.train", *arguments(data, directory, **{"model.width": 64})])
    train_here(data, directory, **{"model.width": 64})      the same on the test's own ranks; raises errors
"""

from __future__ import annotations

from mpilm import train

OPTIONS = {"run.compile": "off", "run.precision": "fp32", "run.steps": 2, "data.sequence_length": 32,
           "data.global_batch_size": 8, "data.micro_batch_size": 2, "model.layers": 1, "model.width": 32,
           "model.heads": 2, "log.tensorboard": "false"}


def arguments(data, directory, **changes):
    """What stands on the command line."""
    options = OPTIONS | {"data.path": data, "run.dir": directory} | changes
    return [text for key, value in options.items() for text in (f"--{key}", str(value))]


def train_here(data, directory, **changes):
    """Train on all ranks of the test."""
    train.main(arguments(data, directory, **changes))
