"""A trained model as others read it: transformers itself opens what was written, and answers as ours does."""

from __future__ import annotations

import sys

import pytest
import torch
from tokenizers import processors

from data_prep._encoder import Encoder
from mpilm import export, resume, trained
from mpilm.checkpoint import Alone
from mpilm.log import UserError
from tests import datasets
from tests.small_jobs import train_here
from tests.test_checkpoint_errors import small_disk

PROMPT, END = "def f(x):", "<|endoftext|>"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two steps, and its data, whose tokenizer begins texts with a token that the model never saw there."""
    place = tmp_path_factory.mktemp("export")
    template = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(END, datasets.END_OF_TEXT)])
    datasets.small(place / "data", template=template)
    train_here(place / "data", place / "run", **{"run.steps": 2, "model.kv_heads": 1})
    return place / "run"


def learned(run, text):
    """The tokens that data_prep makes of a text."""
    return Encoder((run.parent / "data" / "tokenizer.json").read_bytes(), "").encode([text])[0]


def exported(monkeypatch, run, directory, *options):
    """`python -m mpilm.export` in this process."""
    monkeypatch.setattr(sys, "argv", ["export", str(run), "--to", str(directory), *options])
    export.main()


@pytest.mark.serial
@pytest.mark.filterwarnings("ignore")     # transformers' own
@pytest.mark.parametrize(("dtype", "rtol"), [("fp32", 1e-5), ("bf16", 0.05)])
def test_transformers_opens_it(run, dtype, rtol, tmp_path, monkeypatch):
    """By its folder's name: the same logits, the same tokens, and it knows which one ends a text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    exported(monkeypatch, run, tmp_path / "hf", "--dtype", dtype)
    theirs, tokenizer = (auto.from_pretrained(tmp_path / "hf") for auto in (AutoModelForCausalLM, AutoTokenizer))
    ours = trained.model(resume.open_run(str(run), Alone())).eval()
    tokens = tokenizer(PROMPT, return_tensors="pt").input_ids
    assert tokens.tolist() == [learned(run, PROMPT)] and tokenizer.decode(tokens[0]) == PROMPT
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits.float(), ours(tokens), rtol=rtol, atol=rtol)
    assert len({path.stat().st_mode for path in (tmp_path / "hf").iterdir()}) == 1, "who may read one may read all"
    assert theirs.dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    assert theirs.config.eos_token_id == tokenizer.eos_token_id == datasets.END_OF_TEXT


@pytest.mark.serial
def test_a_full_disk_is_told(run, comm, tmp_path, monkeypatch):
    """The library has an error of its own; nothing is left there."""
    with small_disk(comm, tmp_path / "disk", "size=50k") as disk:
        with pytest.raises(UserError, match=r"model\.safetensors: .*No space left"):
            exported(monkeypatch, run, disk / "hf")
        assert not list(disk.iterdir())


@pytest.mark.serial
def test_what_is_there_stays(run, tmp_path, monkeypatch):
    """Whatever it is; nor is anything left half done."""
    with pytest.raises(UserError, match="there is something already"):
        exported(monkeypatch, run, tmp_path)
    assert not list(tmp_path.iterdir())
