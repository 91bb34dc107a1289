"""The matrix products of linear layers: in the weights' dtype, or in fp8.

    y  [rows, out] = x  [rows, in]  @ weight^T          outputs
    dx [rows, in]  = dy [rows, out] @ weight            inputs
    dweight        = dy^T @ x                           always in the weights' dtype

    use("fp8", [part])      the linear layers of a model's part make the first two in fp8 from now on

In fp8, operands are float8_e4m3fn (arXiv 2209.05433): 4 bits of exponent, 3 of mantissa. Every row of them, along which
products are summed, has a scale of its own that makes its largest magnitude the largest there is. Sums are float32. So
a value is off by 1/16 of itself at most, or by a 450,000th of the largest of its row, and what a row becomes depends on
that row alone: not on the micro-batch, nor on any step before. Gradients of weights, which are sums over all tokens,
keep their precision, which costs a third of what fp8 could save.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from mpilm.log import UserError
from mpilm.model.precision import FP8
from mpilm.model.shape import Shape

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
LEAST = torch.finfo(torch.float32).tiny     # of a scale: a row of zeros has one too
GRAIN = 16          # both widths of a weight are multiples of it, for the units of GPUs


class Plain:
    """Products in the dtype of the operands."""

    @staticmethod
    def outputs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., out] of x [..., in] and weight [out, in]."""
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def inputs(dy: Tensor, weight: Tensor) -> Tensor:
        """[..., in] of dy [..., out] and weight [out, in]."""
        return dy @ weight


class Fp8(Plain):
    """Products in fp8, results in the dtype of the operands."""

    @staticmethod
    def outputs(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """As Plain."""
        assert bias is None, "the model's layers have none"
        return _product(x, weight)

    @staticmethod
    def inputs(dy: Tensor, weight: Tensor) -> Tensor:
        """As Plain."""
        return _product(dy, weight.t())


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return Fp8.outputs(x, weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dy, = gradients
        x, weight = ctx.saved_tensors
        return Fp8.inputs(dy, weight), weight_gradient(x, dy)


class Fp8Linear(nn.Linear):
    """A linear layer without bias that multiplies in fp8."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = _Linear.apply(x, self.weight)
        return y


KINDS: dict[type[nn.Linear], type[Plain]] = {nn.Linear: Plain, Fp8Linear: Fp8}     # what layers multiply with


def use(name: str, parts: Iterable[nn.Module]) -> None:
    """Make the plain linear layers of `parts` multiply in the precision `name`: only fp8 is anything to them.

    Those that are more than that, as the head, are left alone.
    """
    for module in [module for part in parts for module in part.modules()] if name == FP8 else ():
        if type(module) is nn.Linear and module.bias is None:
            module.__class__ = Fp8Linear


def check(shape: Shape, tp: int) -> None:
    """Whether fp8 can multiply a model whose layers are shared by `tp` ranks.

    Raises:
        UserError: Names the option that does not fit.
    """
    widths = {"--model.width": shape.width, "--model.width, divided by --parallel.tp,": shape.width // tp,
              "--model.hidden, divided by --parallel.tp,": shape.hidden // tp,
              "--model.kv_heads times the width of a head, divided by --parallel.tp,": shape.kv_width // tp}
    for what, width in widths.items():
        if width % GRAIN:
            raise UserError(f"--run.precision fp8: {what} is {width} and must be a multiple of {GRAIN}. Change it, or "
                            "type --run.precision bf16.")


def weight_gradient(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient [out, in] of a weight, as autograd computes it: its transpose would be other bits in float32."""
    return dy.flatten(0, -2).t() @ x.flatten(0, -2)


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b^T for a [..., n] and b [m, n]."""
    (rows, row_scale), (columns, column_scale) = _scaled(a.flatten(0, -2)), _scaled(b)
    y = torch._scaled_mm(rows, columns.t(), scale_a=row_scale, scale_b=column_scale.t(), out_dtype=a.dtype)
    return y.view(*a.shape[:-1], -1)


def _scaled(a: Tensor) -> tuple[Tensor, Tensor]:
    """(values in fp8, scales): a [rows, n], nearly the product of both. What is not finite makes its row so."""
    wide = a.float()
    scale = (wide.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=LEAST)
    return (wide / scale).to(E4M3).contiguous(), scale
