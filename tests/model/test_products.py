"""Products in fp8: as near as promised, row by row, and what a training step makes of them."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mpilm.log import UserError
from mpilm.model import products
from mpilm.model.gpt import GPT
from mpilm.model.precision import FP8
from mpilm.model.products import Fp8, Fp8Linear, Plain, check, use
from mpilm.model.shape import Shape
from mpilm.parallel.deferred import Deferred

pytestmark = pytest.mark.serial
SHAPE = Shape(layers=2, width=64, heads=4, kv_heads=2, vocab_size=96)
TOKENS = torch.arange(4 * 33).view(4, 33) * 7 % 96
RELATIVE, ABSOLUTE = 2**-4, 2**-10 / 448    # of a value; of the largest of its row


def draw(rows: int, columns: int, seed: int) -> torch.Tensor:
    """Rows of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    sizes = 10.0 ** torch.randint(-15, 7, (rows, 1), generator=random)
    return torch.randn(rows, columns, generator=random) * sizes


def off(a: torch.Tensor) -> torch.Tensor:
    """How much each value may be off."""
    return (RELATIVE * a.abs()).maximum(ABSOLUTE * a.abs().amax(-1, keepdim=True))


@given(rows=st.integers(1, 40), inner=st.integers(1, 6), columns=st.integers(1, 6), seed=st.integers(0, 99))
def test_a_product_is_as_near_as_its_operands(rows, inner, columns, seed):
    """Outputs and input gradients, beside float64."""
    x, weight = draw(rows, 16 * inner, seed).bfloat16(), draw(16 * columns, 16 * inner, seed + 1).bfloat16()
    for found, a, b in ((Fp8.outputs(x, weight), x, weight),
                        (Fp8.inputs(dy := draw(rows, 16 * columns, seed + 2).bfloat16(), weight), dy, weight.t())):
        a, b = a.double(), b.double()
        exact, bound = a @ b.t(), off(a) @ b.abs().t() + a.abs() @ off(b).t() + off(a) @ off(b).t()
        assert ((found.double() - exact).abs() <= 1.01 * bound + 0.005 * exact.abs()).all()


@given(rows=st.integers(2, 40), seed=st.integers(0, 99))
def test_a_row_is_what_it_is_alone(rows, seed):
    """So neither micro-batches nor ranks enter."""
    x = draw(rows, 48, seed).bfloat16()
    together, scales = products._scaled(x)
    for row in range(rows):
        alone, scale = products._scaled(x[row:row + 1])
        assert torch.equal(together[row:row + 1].view(torch.uint8), alone.view(torch.uint8))
        assert torch.equal(scales[row:row + 1], scale)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_so():
    """A step with such a gradient is skipped."""
    weight, x = draw(16, 32, 1).bfloat16(), torch.zeros(4, 32, dtype=torch.bfloat16)
    assert not Fp8.outputs(x, weight).any()
    for poison in (float("nan"), float("inf")):
        x[1, 3] = poison
        y = Fp8.outputs(x, weight)
        assert not torch.isfinite(y[1]).any() and not y[0].any()


def test_a_layer_s_weight_gradient_is_that_of_bf16():
    """The same bits, for the same gradient of its outputs; that of its inputs is an fp8 product."""
    plain = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    low, x = copy.deepcopy(plain), draw(24, 64, 3).bfloat16()
    use(FP8, [low])
    assert type(low) is Fp8Linear
    dy = draw(24, 32, 4).bfloat16()
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    for layer, mine in zip((plain, low), inputs, strict=True):
        layer(mine).backward(dy)
    assert torch.equal(plain.weight.grad, low.weight.grad)
    assert torch.equal(inputs[1].grad, Fp8.inputs(dy, plain.weight))
    assert torch.equal(inputs[0].grad, Plain.inputs(dy, plain.weight))


def gradients(*, late: bool) -> list[torch.Tensor]:
    """Of a model in fp8, in one backward pass or in two halves."""
    model = GPT(SHAPE)
    model.initialize(seed=1)
    model.bfloat16()
    use(FP8, [model])
    halves = Deferred(model) if late else None
    if halves:
        halves.prepare((4, 32))
    loss = model(TOKENS[:, :-1], TOKENS[:, 1:])
    if halves:
        halves.backward(loss, None, None).weights()
    else:
        loss.backward()
    return [parameter.grad for parameter in model.parameters()]


def test_the_halves_of_a_backward_pass_are_the_whole():
    """Under the zero-bubble schedule the same layers multiply in fp8."""
    for one, other in zip(gradients(late=False), gradients(late=True), strict=True):
        assert torch.equal(one, other)


def test_the_head_keeps_its_precision():
    """Only the blocks' layers multiply in fp8: four in each."""
    model = GPT(SHAPE)
    use(FP8, [model])
    assert sum(isinstance(module, Fp8Linear) for module in model.modules()) == 4 * SHAPE.layers
    assert type(model.lm_head).__name__ == "Head"


@pytest.mark.parametrize(("width", "heads", "tp", "option"), [
    (72, 4, 1, "--model.width is 72"), (64, 4, 8, "divided by --parallel.tp, is 8"), (64, 4, 1, "")])
def test_what_does_not_fit_is_refused(width, heads, tp, option):
    """With the option that is to be changed."""
    shape = Shape(layers=1, width=width, heads=heads, vocab_size=64)
    if not option:
        check(shape, tp)
        return
    with pytest.raises(UserError, match=option):
        check(shape, tp)
