"""Small lists of layers and a few steps of them, in process: over all ranks, or on each rank alone."""

from __future__ import annotations

from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from mpilm import hybrid, sequential
from mpilm.config import Config, Data, Optim, Parallel, Run, Sync
from mpilm.launch import session

STEPS, EXAMPLES = 3, 21


def perceptron():
    """Another width at every cut; layers that work in place, that draw at random, that have no weights."""
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(inplace=True), nn.Dropout(0.3), nn.Linear(24, 10), nn.Tanh(),
                         nn.LayerNorm(10), nn.Linear(10, 6), nn.GELU(), nn.Linear(6, 4))


def images():
    """More dimensions before the cut than after it; memory that is not contiguous in between."""
    torch.manual_seed(6)
    return [nn.Unflatten(1, (1, 3, 4)), nn.Conv2d(1, 5, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(2, 3),
            Turned(), nn.Linear(5, 7), nn.Flatten(), nn.Linear(84, 4)]


class Turned(nn.Module):
    """A view that is not contiguous."""

    def forward(self, x):
        """[B, C, N] -> [B, N, C]."""
        return x.mT


def examples(count=EXAMPLES):
    """(inputs, labels), the same on every rank; more than one step has and less than two have."""
    draw = np.random.default_rng(7)
    return draw.normal(size=(count, 12)), draw.integers(0, 4, count)


def configuration(*, lr=1e-2, clip=1.0, decay=0.1, precision="fp32", collective="shared", reproducible=True, slots=8,
                  **parallel):
    """A step of 16 examples; `parallel`: options of that section."""
    return Config(run=Run(steps=STEPS, seed=3, precision=precision, reproducible=reproducible),
                  data=Data(global_batch_size=16, micro_batch_size=16 // slots),
                  optim=Optim(lr=lr, warmup_steps=0, min_lr=1.0, clip=clip, weight_decay=decay, eps=1e-3),
                  sync=Sync(collective=collective, bucket_mib=0.25), parallel=Parallel(**parallel))


def everyone(layers, config, **options):
    """A model over all ranks."""
    return hybrid.model(layers, nn.functional.cross_entropy, *examples(), config, **options)


@contextmanager
def alone(layers, config, *, loss=nn.functional.cross_entropy, **options):
    """The same on one rank: each rank for itself."""
    with session() as world:
        yield sequential.build(layers, loss, *examples(), config, world.alone(), **options)


def course(model):
    """What STEPS steps give: losses, norms, weights, and what the model makes of some inputs then."""
    losses, norms = [], []
    for _ in range(STEPS):
        losses.append(model.step())
        norms.append(model.grad_norm)
    return losses, norms, model.state_dict(), model.predict(examples(13)[0])


def same(one, other):
    """To the last bit."""
    return (one[:2] == other[:2] and list(one[2]) == list(other[2])
            and all(torch.equal(value, other[2][name]) for name, value in one[2].items())
            and np.array_equal(one[3], other[3]))
