"""Our GPT against transformers' Llama with the same weights, and against itself."""

import itertools

import pytest
import torch
from torch import Tensor

from mpilm.model.gpt import GPT
from mpilm.model.hub import to_hub
from mpilm.model.shape import Shape

pytestmark = pytest.mark.serial
PLAIN = Shape(layers=2, width=48, heads=4, vocab_size=97)
GROUPED = Shape(layers=2, width=64, heads=4, kv_heads=2, hidden=96, vocab_size=97)
TIED = Shape(layers=1, width=32, heads=2, kv_heads=1, vocab_size=61, tied_embeddings=True, rope_theta=500.0)
shapes = pytest.mark.parametrize("shape", [PLAIN, GROUPED, TIED], ids=["plain", "grouped", "tied"])


def model_of(shape: Shape, *, dtype: torch.dtype = torch.float32) -> GPT:
    model = GPT(shape)
    model.initialize(seed=3)
    return model.to(dtype)


def tokens(shape: Shape, *, batch: int = 3, length: int = 17) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(shape.vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(5))
    return drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous()


def llama_of(model: GPT) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    from mpilm.model.hub import config

    settings = config(model.shape, max_length=2048, end_of_text=0)
    llama = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in settings.items() if k not in ("architectures", "dtype")}))
    weights = {to_hub(name): tensor.clone() for name, tensor in model.tensors()}
    missing = llama.load_state_dict(weights, strict=False).missing_keys
    assert missing == (["lm_head.weight"] if model.shape.tied_embeddings else [])
    return llama


@shapes
def test_logits_loss_and_gradients_are_llamas(shape: Shape) -> None:
    model, (inputs, targets) = model_of(shape), tokens(shape)
    llama = llama_of(model)
    theirs = llama(input_ids=inputs).logits
    torch.testing.assert_close(model(inputs), theirs, rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(theirs.flatten(0, 1), targets.flatten())
    loss = model(inputs, targets)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    expected.backward()
    loss.backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in llama.named_parameters()}
    for name, parameter in model.named_parameters():
        parts = shape.parts(name)
        rows = [dimensions[0] for dimensions in parts.values()]
        assert parameter.grad is not None
        for part, gradient in zip(parts, parameter.grad.split(rows), strict=True):
            torch.testing.assert_close(gradient, gradients[part], rtol=1e-3, atol=1e-6)


@shapes
def test_parameters_are_the_shapes(shape: Shape) -> None:
    model = GPT(shape)
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == shape.parameters()
    assert list(shape.parameters()) == [name for name, _ in model.named_parameters()]
    assert {name: tuple(t.shape) for name, t in model.tensors()} == shape.tensors()


def test_masked_documents_equal_separate_documents() -> None:
    model, (inputs, targets) = model_of(GROUPED), tokens(GROUPED, batch=2, length=24)
    ends = [[0, 5, 6, 24], [0, 11, 24, 24]]
    documents = torch.zeros(2, 24, dtype=torch.int64)
    for row, bounds in enumerate(ends):
        for number, (start, stop) in enumerate(itertools.pairwise(bounds)):
            documents[row, start:stop] = number
    logits = model(inputs, documents=documents)
    for row, bounds in enumerate(ends):
        for start, stop in itertools.pairwise(bounds):
            if stop > start:      # rotary attention knows only differences of positions
                torch.testing.assert_close(logits[row, start:stop], model(inputs[row:row + 1, start:stop])[0],
                                           rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model(inputs, targets, documents), torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten()), rtol=1e-5, atol=1e-6)


def test_the_future_is_not_seen() -> None:
    model, (inputs, _) = model_of(PLAIN), tokens(PLAIN)
    changed = inputs.clone()
    changed[:, 9:] = (changed[:, 9:] + 1) % PLAIN.vocab_size
    torch.testing.assert_close(model(inputs)[:, :9], model(changed)[:, :9])


def test_bfloat16_is_close_to_float32() -> None:
    exact, rounded = model_of(GROUPED), model_of(GROUPED, dtype=torch.bfloat16)
    inputs, targets = tokens(GROUPED)
    loss, narrow = exact(inputs, targets), rounded(inputs, targets)
    loss.backward()
    narrow.backward()
    assert narrow.dtype == torch.float32
    assert abs(loss.item() - narrow.item()) < 0.02
    for ours, wide in zip(rounded.parameters(), exact.parameters(), strict=True):
        assert ours.grad is not None and wide.grad is not None and ours.grad.dtype == torch.bfloat16
        assert torch.nn.functional.cosine_similarity(ours.grad.float().flatten(), wide.grad.flatten(), dim=0) > 0.99
