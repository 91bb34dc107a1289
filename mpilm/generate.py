"""Let a trained model write: python -m mpilm.generate RUN_OR_CHECKPOINT --prompt "import os" --tokens 100."""

from __future__ import annotations

import argparse
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpilm import launch, startup
from mpilm.log import UserError, say

if TYPE_CHECKING:
    import numpy as np

    from mpilm.model.gpt import GPT


def main() -> None:
    """Read a checkpoint and continue the prompt, on rank 0."""
    parser = argparse.ArgumentParser(prog="python -m mpilm.generate", description=__doc__)
    parser.add_argument("path", help="run directory or checkpoint")
    parser.add_argument("--data.path", dest="data", default="",
                        help="dataset whose tokenizer is used; default: the one it was trained on")
    parser.add_argument("--prompt", default="import ", help="what the text begins with")
    parser.add_argument("--tokens", type=int, default=200, help="how many to write at most: a text may end before")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the most likely token")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    if options.tokens < 1 or not 0 <= options.temperature < float("inf") or options.seed < 0:
        raise UserError("--tokens: give a number from 1 up; --temperature and --seed: from 0 up.")
    with launch.session() as world:
        with startup.loading():
            from mpilm import resume, trained
            from mpilm.model.cache import Cache

        reader = resume.open_run(options.path, world.comm)
        config = resume.config_of(reader)
        path = options.data or config.data.path
        resume.require_tokenizer(reader, path)
        text = sample(trained.model(reader, context=Cache()), path, options.prompt, num_tokens=options.tokens,
                      context=config.data.sequence_length, temperature=options.temperature, seed=options.seed)
        say(text)


def sample(model: GPT, data_path: str, prompt: str, *, num_tokens: int, context: int, temperature: float,
           seed: int) -> str:
    """The prompt and what the model, whose context is a `Cache`, writes after it, by the tokenizer of the dataset at
    `data_path`.

    Raises:
        UserError: The prompt is empty, or no text, or the tokenizer has no tokens for it.
    """
    from tokenizers import Tokenizer

    from mpilm.data import tokenizer
    from mpilm.data._format import TOKENIZER, read_index

    try:
        prompt.encode()
    except UnicodeEncodeError:
        raise UserError("--prompt: these bytes are no text in UTF-8.") from None
    words = tokenizer.settle(Tokenizer.from_buffer((Path(data_path) / TOKENIZER).read_bytes()))
    try:
        tokens = words.encode(prompt, add_special_tokens=False).ids
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"--prompt {prompt!r}: the tokenizer has no token for something in it ({error}).") from None
    if not tokens:
        raise UserError(f"--prompt {prompt!r}: the tokenizer makes no token of it. Give a text it knows.")
    written = continuation(model, tokens, num_tokens=num_tokens, end=read_index(data_path).end_of_text,
                           context=context, temperature=temperature, seed=seed)
    return str(words.decode(tokens + written))


def continuation(model: GPT, prompt: list[int], *, num_tokens: int, end: int, context: int, temperature: float,
                 seed: int) -> list[int]:
    """The tokens that follow `prompt`, drawn one by one: `num_tokens`, or fewer where the text ends.

    Args:
        model: Its context is a `Cache`.
        prompt: At least one token.
        end: The token that ends a text; it is not among those that are returned.
        context: The model sees at most so many of the last tokens, and at least half as many.
        temperature: 0 takes the most likely token; 1 draws from the model's distribution.

    Raises:
        UserError: The model is broken.
    """
    import numpy as np
    import torch

    from mpilm.model.cache import Cache

    draw, cache = np.random.default_rng(seed), model.context
    assert isinstance(cache, Cache)
    tokens, new = list(prompt), prompt[-context:]
    with torch.no_grad(), _uncompiled():
        for _ in range(num_tokens):
            if cache.length + len(new) > context:   # every token would stand elsewhere then
                cache.clear()
                new = tokens[-max(1, context // 2):]
            logits = model(torch.tensor([new]))[0, -1].double()
            token = _pick(logits.numpy(), temperature, draw)
            if token == end:
                break
            tokens.append(token)
            new = [token]
    return tokens[len(prompt):]


def _uncompiled() -> AbstractContextManager[Any]:
    """A sequence that grows by a token would make torch.compile specialize again and again."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()  # nothing is compiled, and importing the compiler takes seconds
    import torch

    return torch.compiler.set_stance("force_eager")


def _pick(logits: np.ndarray, temperature: float, draw: np.random.Generator) -> int:
    import numpy as np

    if not np.isfinite(logits).all():
        raise UserError("The model answers with numbers that are not finite: its training went astray. Give an earlier "
                        "checkpoint of it.")
    if temperature == 0:
        return int(logits.argmax())
    weights = np.exp((logits - logits.max()) / temperature)
    return int(draw.choice(len(weights), p=weights / weights.sum()))


if __name__ == "__main__":
    launch.command(main)
