"""A sequence that grows token by token: what the model says is what it says to the whole sequence."""

import pytest
import torch

from mpilm import generate
from mpilm.model.cache import Cache
from mpilm.model.gpt import GPT
from tests.model.test_gpt import PLAIN, model_of, shapes, tokens

pytestmark = pytest.mark.serial
END = PLAIN.vocab_size      # no token


def growing(model: GPT) -> GPT:
    """The same model with a cache."""
    found = GPT(model.shape, context=Cache()).to(next(model.parameters()).dtype)
    found.load_state_dict(model.state_dict())
    return found


@shapes
@pytest.mark.parametrize("first", [1, 5, 128, 250])
@torch.no_grad()
def test_one_token_more(shape, first):
    """Also of another sequence after it is cleared; several sequences at once."""
    whole = model_of(shape)
    model, (inputs, _) = growing(whole), tokens(shape, length=first + 6)
    for sequence in (inputs, inputs.flip(0)):
        found = [model(sequence[:, :first])[:, -1]]
        found += [model(sequence[:, at:at + 1])[:, -1] for at in range(first, first + 6)]
        torch.testing.assert_close(torch.stack(found, 1), whole(sequence)[:, first - 1:], rtol=1e-4, atol=1e-5)
        model.context.clear()


@torch.no_grad()
def test_in_bf16():
    whole = model_of(PLAIN, dtype=torch.bfloat16)
    model, (inputs, _) = growing(whole), tokens(PLAIN, length=40)
    model(inputs[:, :39])
    torch.testing.assert_close(model(inputs[:, 39:])[:, -1], whole(inputs)[:, -1], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("context", [1, 2, 7, 64])
@pytest.mark.parametrize("first", [1, 6, 7, 8, 30])
def test_what_it_writes_is_what_it_would_write_without(context, first):
    """It sees at most `context` tokens, and at least half as many of those there are."""
    whole = model_of(PLAIN)
    model, prompt = growing(whole), tokens(PLAIN, length=first)[0][0].tolist()
    seen: list[int] = []
    model.register_forward_hook(lambda *_: seen.append(model.context.length))
    written = generate.continuation(model, prompt, num_tokens=30, end=END, context=context, temperature=0, seed=0)
    text = prompt + written
    assert len(written) == len(seen) == 30
    for at, length in enumerate(seen, first):
        assert min(at, context // 2) <= length <= context
        with torch.no_grad():
            logits = whole(torch.tensor([text[at - length:at]]))[0, -1]
        assert logits[text[at]] >= logits.max() - 1e-4
