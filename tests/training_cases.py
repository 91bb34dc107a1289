"""A small model and a few steps of it, in process: over all ranks, or on one rank alone."""

from __future__ import annotations

import numpy as np
import torch

from mpilm import assemble, failure
from mpilm.arithmetic import Arithmetic
from mpilm.config import Config, Data, Model, Optim, Parallel, Run, Sync
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.sync.sharded import Sharded

VOCAB, LENGTH, SEQUENCES, STEPS = 101, 24, 8, 2
ALONE = {}  # of every configuration that was asked for
SMOOTH = 1e-3  # with a small eps Adam moves by the sign of gradients that are nothing but rounding


def configuration(collective="shared", *, reproducible=True, bucket_mib=0.5, micro_batch_size=1, clip=1.0,
                  kind="allreduce", level=1, sequences=SEQUENCES, tied=False, layers=2, steps=STEPS, model=None,
                  **parallel):
    """A small model and a step of eight sequences, or of fewer; `model` and `parallel`: options of these sections."""
    shape = {"width": 64, "heads": 4, "kv_heads": 2} if model is None else model
    return Config(run=Run(steps=steps, reproducible=reproducible),
                  model=Model(layers=layers, tied_embeddings=tied, **shape),
                  data=Data(sequence_length=LENGTH, global_batch_size=sequences, micro_batch_size=micro_batch_size),
                  optim=Optim(lr=1e-2, warmup_steps=2, clip=clip, eps=SMOOTH),
                  sync=Sync(kind=kind, level=level, collective=collective, bucket_mib=bucket_mib),
                  parallel=Parallel(**parallel))


# Of everything a multiple of 1, 2, 3, 4 and 8, so that so many ranks can share it; more words than the data has.
DIVISIBLE = {"width": 96, "heads": 24, "kv_heads": 24, "hidden": 192, "vocab_size": 120}


def divisible(collective="shared", **options):
    """A model whose layers can be shared."""
    return configuration(collective, model=DIVISIBLE, **options)


def apart(found, expected):
    """Largest relative difference: of losses and norms each, of a parameter relative to its largest value."""
    numbers = [abs(a / b - 1) for a, b in zip(found[0] + found[1], expected[0] + expected[1], strict=True)]
    return max([*numbers, *((value - expected[2][name]).abs().max().item() / expected[2][name].abs().max().item()
                            for name, value in found[2].items())])


def same(one, other):
    """All bits that both hold."""
    return one[:2] == other[:2] and all(torch.equal(one[2][name], value) for name, value in other[2].items())


def sharded(collective, level, **options):
    """The same with memory divided over the ranks."""
    return configuration(collective, kind="sharded", level=level, **options)


def batch_of(core, step=0):
    """This rank's slots of a step, of one sequence each."""
    tokens = windows(step).reshape(-1, 1, LENGTH + 1)[list(core.slots)]
    return Batch(tokens[..., :-1], tokens[..., 1:], None)


def windows(step):
    """[SEQUENCES, LENGTH + 1] tokens of a step, the same on every rank."""
    return np.random.default_rng(step).integers(0, VOCAB, (SEQUENCES, LENGTH + 1))


def parallel(config, *, precision="fp32", synchronous=False, compiled=False):
    """Steps on all ranks. Returns (losses, norms, this rank's parameters)."""
    with session() as world:
        result = train(config, world, precision=precision, synchronous=synchronous, compiled=compiled)
        world.comm.Barrier()
        return result


def alone(config, *, precision="fp32", compiled=False):
    """The same steps on one rank, once for all tests: the first does them, and all ranks get what came out."""
    key = config.to_toml(), precision, compiled, assemble.Update    # which a test may have replaced
    with session() as world:
        if key not in ALONE:
            ALONE[key] = failure.on_root(world.comm, lambda: train(config, world.alone(), precision=precision,
                                                                   compiled=compiled))
    return ALONE[key]


def build(config, world, *, precision="fp32", compiled=False):
    """Model and synchronizer over the ranks of `world`, with initial weights."""
    core = assemble.build(config, world, assemble.shape_of(config, VOCAB), arithmetic(config, precision, compiled))
    assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
    return core


def arithmetic(config, precision="fp32", compiled=False):
    """What would be decided at the start."""
    return Arithmetic(precision, compiled, 1, config.data.micro_batch_size, config.run.reproducible, "", "")


def train(config, world, *, precision, synchronous=False, compiled=False):
    """STEPS steps over the ranks of `world`; `synchronous` holds every send back until it is being received."""
    core = build(config, world, precision=precision, compiled=compiled)
    for ledger in (core.pipeline.messages.ledger, *core.parts[0].context.ledgers):
        ledger.synchronous = synchronous
    return course(core, config)


def course(core, config, draw=windows):
    """The configured steps on the sequences that draw(step) gives: (losses, norms, this rank's parameters)."""
    losses, norms = [], []
    size = config.data.micro_batch_size
    for step in range(config.run.steps):
        tokens = draw(step)[:config.data.global_batch_size].reshape(-1, size, LENGTH + 1)[list(core.slots)]
        mine = core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
        core.update.begin(step)
        core.sync.step(core.update)
        losses.append(core.losses.mean(mine))
        norms.append(core.sync.grad_norm)
    if isinstance(core.sync, Sharded):
        core.sync.fetch()
    return losses, norms, {name: p.detach().clone() for name, p in core.parameters().items()}
