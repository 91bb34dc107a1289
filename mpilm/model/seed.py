"""A backward pass that begins with a gradient: torch.autograd.backward(seed(y, dy)) is torch.autograd.backward(y, dy).

PyTorch compares the shapes of `y` and `dy` by what needs sympy, as little else does unless code is compiled: a second
and 40 MB of every rank. A scalar begins with 1 and has nothing to compare.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def seed(output: Tensor, gradient: Tensor | None) -> Tensor:
    """A scalar whose backward pass gives `output` this gradient, of its shape and dtype; None: `output`, a scalar."""
    if gradient is None:
        return output
    with torch.enable_grad():       # inside of another backward pass nothing would be recorded
        scalar: Tensor = _Seed.apply(output, gradient.detach())
    return scalar


class _Seed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, gradient: Tensor) -> Tensor:
        assert output.shape == gradient.shape, f"{tuple(output.shape)} and {tuple(gradient.shape)}"
        ctx.gradient = gradient
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *ones: Tensor) -> tuple[Tensor, None]:
        gradient, ctx.gradient = ctx.gradient, None     # a parameter would copy what somebody else still holds
        return gradient, None
