"""The model of a checkpoint by itself, for evaluation and generation.

    model = trained.model(resume.open_run(path, comm))
    model = trained.model(resume.open_run(path, comm), context=Cache())     # that writes
"""

from __future__ import annotations

import torch

from mpilm.checkpoint import Reader
from mpilm.model import precision, products
from mpilm.model.context import WHOLE, Whole
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape


def model(reader: Reader, device: torch.device | str = "cpu", context: Whole = WHOLE) -> GPT:
    """All of it, with the arithmetic that it was trained with, so that its validation loss is the one of the run.

    Args:
        context: What it sees of a sequence; a `Cache` for one that grows.
    """
    found, trained_in = GPT(Shape(**reader.meta["shape"]), context=context), reader.meta["arithmetic"]["precision"]
    for name, tensor in found.tensors():
        tensor.copy_(torch.from_numpy(reader.read(f"model.{name}", 0, tensor.numel())).view(tensor.shape))
    products.use(trained_in, [found])
    return found.to(device, precision.DTYPES[precision.carrier(trained_in)])
