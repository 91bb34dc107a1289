"""The head's loss: its gradient, which is computed with the loss and divided by what the loss will be divided by."""

import pytest
import torch

from mpilm.model import head
from mpilm.model.head import Head

ROWS, WIDTH, VOCAB = 24, 16, 40


def gradients(divisor, *, told, dtype, passes=1):
    """Of weight and inputs, from `passes` backward passes of loss / divisor; the head is `told` the divisor."""
    draw = torch.Generator().manual_seed(1)
    head = Head(WIDTH, VOCAB)
    with torch.no_grad():
        head.weight.normal_(generator=draw)
    head.to(dtype)
    head.divisor = told
    x = torch.randn(ROWS, WIDTH, generator=draw).to(dtype).requires_grad_()
    targets = torch.randint(VOCAB, (ROWS,), generator=draw)
    loss = head.loss(x, targets) / divisor
    for turn in range(passes):
        loss.backward(retain_graph=turn < passes - 1)
    return head.weight.grad, x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("divisor", [1, 2, 64])
def test_a_divisor_that_is_known_changes_no_bit(dtype, divisor):
    """If it is a power of two, as in reproducible mode."""
    for told, untold in zip(gradients(divisor, told=divisor, dtype=dtype), gradients(divisor, told=1, dtype=dtype),
                            strict=True):
        assert told.abs().sum() > 0
        assert torch.equal(told, untold)


@pytest.mark.parametrize(("divisor", "told"), [(3, 3), (3, 2), (1, 5)])
def test_whatever_it_is_told_the_gradient_is_that_of_the_loss(divisor, told):
    for mine, exact in zip(gradients(divisor, told=told, dtype=torch.float32),
                           gradients(divisor, told=1, dtype=torch.float64), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-5, atol=1e-7)


def test_what_is_divided_already_is_not_gone_over_again():
    """The gradient of the weights is what was computed with the loss; also for divisors that floats do not have."""
    for divisor in range(1, 257):
        head = Head(WIDTH, VOCAB)
        head.divisor = divisor
        loss = head.loss(torch.randn(ROWS, WIDTH), torch.zeros(ROWS, dtype=torch.int64))
        computed = loss.grad_fn.saved_tensors[1].data_ptr()
        (loss / divisor).backward()
        assert head.weight.grad.data_ptr() == computed, divisor


def test_a_second_backward_pass_adds_the_same():
    """What the graph keeps is not what a parameter's gradient is added to."""
    for twice, once in zip(gradients(2, told=2, dtype=torch.float32, passes=2),
                           gradients(2, told=2, dtype=torch.float32), strict=True):
        assert torch.equal(twice, 2 * once)


def test_an_evaluation_keeps_no_logits():
    """Whoever evaluates records a graph: logits in float32 for all rows would be many times what training needs."""
    head, kept = Head(WIDTH, VOCAB).eval(), []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        loss = head.loss(torch.randn(ROWS, WIDTH).requires_grad_(), torch.zeros(ROWS, dtype=torch.int64))
    assert not kept
    assert not loss.requires_grad


def test_a_gradient_in_chunks_is_rounded_once(monkeypatch):
    """A long vocabulary is gone through in dozens of them, and bf16 loses a little of every sum."""
    exact = gradients(1, told=1, dtype=torch.float64)
    whole = gradients(1, told=1, dtype=torch.bfloat16)
    monkeypatch.setattr(head, "CHUNK", VOCAB)
    chunked = gradients(1, told=1, dtype=torch.bfloat16)
    errors = [(weight.double() - exact[0]).norm() for weight, _ in (whole, chunked)]
    assert chunked[0].dtype == torch.bfloat16
    assert errors[1] <= 1.06 * errors[0]
