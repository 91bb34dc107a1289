"""A tokenizer of the `tokenizers` library as datasets are encoded with it, for everyone who gives a model text."""

from __future__ import annotations

from typing import Any


def settle(tokenizer: Any) -> Any:
    """The same tokenizer, for which the same text has the same tokens: nothing is added, nothing cut, nothing drawn;
    and text that spells a special token is text."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    if getattr(tokenizer.model, "dropout", None):
        tokenizer.model.dropout = None
    return tokenizer
