"""What somebody gives to be trained, layers and arrays, made what training takes, or refused.

    array("inputs", images)                     # a NumPy array of numbers, [examples, ...]
    check(layers, torch.float32)                # can be trained, sent and saved
    fingerprint(layers, arrays, ...)            # the same on all ranks, or they train different things
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor, nn

from mpilm.log import UserError

NUMBERS = "biuf"    # kinds of NumPy's types


def array(name: str, given: Any, *, like: np.ndarray | None = None) -> np.ndarray:
    """`given`, a tensor, an array, a list or an HDF5 dataset, as an array in memory: [examples, ...].

    Args:
        name: For the message.
        like: Examples must have the shape of its examples.

    Raises:
        UserError: It is no such array of numbers.
    """
    if isinstance(given, Tensor):
        given = given.detach().cpu()
        given = (given.float() if given.dtype is torch.bfloat16 else given).numpy()
    try:
        found = np.asarray(given)
    except ValueError as error:
        raise UserError(f"{name}: {error}. Give an array or a tensor, [examples, ...].") from None
    if found.dtype.kind not in NUMBERS or not found.ndim:
        raise UserError(f"{name}: {found.dtype} of shape {found.shape}. Give an array or a tensor of numbers, "
                        "[examples, ...].")
    if like is not None and found.shape[1:] != like.shape[1:]:
        raise UserError(f"{name}: examples of shape {found.shape[1:]}; the model was made for {like.shape[1:]}.")
    return found.astype(found.dtype.newbyteorder("="), copy=False)


def check(layers: Mapping[str, nn.Module]) -> None:
    """Refuse what can't be trained.

    Raises:
        UserError: Nothing is to be trained, or a layer holds what can't be sent and saved.
    """
    model = nn.ModuleList(layers.values())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, tensor in tensors.items():
        if nn.parameter.is_lazy(tensor):
            raise UserError(f"{_layer(layers, name)} is lazy: call it once, so that it has its shape.")
        if tensor.is_complex():
            raise UserError(f"{_layer(layers, name)} has complex numbers: split them into real ones.")
    if others := [name for name, value in model.state_dict().items() if not isinstance(value, Tensor)]:
        raise UserError(f"{_layer(layers, others[0])} has extra state in its state_dict: keep it in buffers.")
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("No layer has a parameter that is trained: there is nothing to learn.")


def _layer(layers: Mapping[str, nn.Module], name: str) -> str:
    number = int(name.split(".")[0])
    return f"Layer {number} ({type(list(layers.values())[number]).__name__})"


def fingerprint(layers: Mapping[str, nn.Module], arrays: Mapping[str, np.ndarray], **options: Any) -> dict[str, Any]:
    """What must be the same on all ranks. Values of weights are not in it: those of rank 0 are everyone's."""
    tensors = {name: [list(value.shape), str(value.dtype), value.requires_grad]
               for name, value in nn.ModuleDict(layers).state_dict(keep_vars=True).items()}
    values = {name: [list(given.shape), str(given.dtype), xxhash.xxh3_64_hexdigest(np.ascontiguousarray(given).data)]
              for name, given in arrays.items()}
    return {"layers": {name: repr(layer) for name, layer in layers.items()}, "tensors": tensors, **values, **options}
