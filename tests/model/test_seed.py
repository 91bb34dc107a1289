"""A backward pass that begins with a gradient has the bits of PyTorch's own, and loads nothing for it."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from mpilm.model.seed import seed
from tests.helpers import REPOSITORY, clean_environment

pytestmark = pytest.mark.serial
PROGRAM = """
import sys, torch
from mpilm.model.seed import seed
x = torch.ones(2, 3, requires_grad=True)
torch.autograd.backward(seed(2 * x, torch.full((2, 3), 5.0)))
print(x.grad.unique().tolist(), "sympy" in sys.modules)
"""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradients_are_those_of_pytorch(dtype):
    layer = torch.nn.Linear(8, 5, dtype=dtype)
    x, dy = torch.randn(4, 8, dtype=dtype, requires_grad=True), torch.randn(4, 5, dtype=dtype)
    wanted = torch.autograd.grad(layer(x), [x, layer.weight, layer.bias], dy)
    with torch.no_grad():
        y = torch.enable_grad()(layer)(x)
        found = torch.autograd.grad(seed(y, dy), [x, layer.weight, layer.bias])
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_scalar_begins_with_one():
    x = torch.ones(3, requires_grad=True)
    torch.autograd.backward(seed((x * x).sum(), None))
    assert x.grad is not None and x.grad.tolist() == [2, 2, 2]


def test_a_parameter_keeps_the_gradient_it_is_given():
    """PyTorch copies it for one who gets what somebody else still holds."""
    parameter, gradient = torch.nn.Parameter(torch.ones(40, 30)), torch.ones(40, 30)
    torch.autograd.backward(seed(parameter, gradient))
    assert parameter.grad is not None and parameter.grad.data_ptr() == gradient.data_ptr()


def test_another_shape_is_no_gradient():
    with pytest.raises(AssertionError, match=r"3.* and .*2"):
        seed(torch.ones(3, requires_grad=True), torch.ones(2))


def test_nothing_is_loaded():
    result = subprocess.run([sys.executable, "-c", PROGRAM], env=clean_environment(), cwd=REPOSITORY,
                            capture_output=True, text=True, check=False)
    assert result.stdout == "[10.0] False\n", result
