"""The model of a checkpoint by itself, for evaluation and generation.

    model = trained.model(resume.open_run(path, comm))
"""

from __future__ import annotations

import torch

from mpilm.checkpoint import Reader
from mpilm.model import precision, products
from mpilm.model.gpt import GPT
from mpilm.model.shape import Shape


def model(reader: Reader, device: torch.device | str = "cpu") -> GPT:
    """All of it, with the arithmetic that it was trained with, so that its validation loss is the one of the run."""
    found, trained_in = GPT(Shape(**reader.meta["shape"])), reader.meta["arithmetic"]["precision"]
    for name, tensor in found.tensors():
        tensor.copy_(torch.from_numpy(reader.read(f"model.{name}", 0, tensor.numel())).view(tensor.shape))
    products.use(trained_in, [found])
    return found.to(device, precision.DTYPES[precision.carrier(trained_in)])
