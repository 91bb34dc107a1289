"""A trained model is measured and made to write, with the data it learned or data of the same tokenizer."""

from __future__ import annotations

import math
import shutil
import sys

import pytest
import torch
from mpi4py import MPI
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from mpilm import assemble, evaluate, generate, validation
from mpilm.data import _format
from mpilm.log import UserError
from mpilm.model.cache import Cache
from mpilm.model.gpt import GPT
from mpilm.parallel import pipeline
from tests import datasets
from tests.data.cases import documents, write_dataset
from tests.small_jobs import train_here
from tests.training_cases import configuration


@pytest.mark.slow
def test_a_large_split_goes_through_memory_in_pieces(comm, monkeypatch, tmp_path_all):
    """The loss has the same bits for any pieces and any number of ranks."""
    config = configuration(micro_batch_size=2)
    config.data.path, config.log.validation_sequences = str(datasets.for_all(comm, tmp_path_all / "data")), 57
    model = GPT(assemble.shape_of(config, datasets.VOCAB_SIZE))
    model.initialize(seed=1)
    losses = set()
    for tokens in (1, 100, 1 << 20):
        monkeypatch.setattr(validation, "TOKENS", tokens)
        for ranks in (comm, MPI.COMM_SELF):
            measured = assemble.validation(config, pipeline.alone(model), ranks)
            assert measured.tokens == 56 * config.data.sequence_length
            losses |= {measured.loss(), measured.loss()}
    assert len(losses) == 1, losses


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A directory of this module's."""
    return tmp_path_factory.mktemp("place")


@pytest.fixture(scope="module")
def data(place):
    """A small dataset."""
    return datasets.small(place / "data")


@pytest.mark.serial
def test_data_that_has_moved_and_data_of_another_tokenizer(run_mpi, data, place, monkeypatch):
    """Where it is now is asked for; other tokens are refused instead of giving a number that means nothing."""
    run = place / "run"
    train_here(data, run)
    other = place / "other"
    write_dataset(other, documents(40), validation=documents(10))
    data.rename(place / "moved")
    monkeypatch.setattr(sys, "argv", ["generate", str(run), "--tokens", "2"])
    with pytest.raises(UserError, match=f"was at {data}; --data.path says where it is now"):
        generate.main()
    result = run_mpi(0, ["-m", "mpilm.generate", str(run), "--tokens", "2", "--data.path", str(place / "moved")])
    assert result.rc == 0 and "import " in result.stdout, result
    monkeypatch.setattr(sys, "argv", ["evaluate", str(run), "--data.path", str(other)])
    with pytest.raises(UserError, match="another tokenizer"):
        evaluate.main()
    shutil.rmtree(other)


@pytest.mark.serial
@pytest.mark.parametrize(("command", "option", "value"), [
    ("evaluate", "sequences", "0"), ("generate", "tokens", "0"), ("generate", "temperature", "nan"),
    ("generate", "seed", "-1"), ("plan", "micro-batches", "0")])
def test_numbers_that_make_no_sense(run_mpi, command, option, value):
    result = run_mpi(0, ["-m", f"mpilm.{command}", *(["--show-schedule"] if command == "plan" else ["run"]),
                         f"--{option}", value])
    assert result.rc == 2 and f"--{option}" in result.stderr and "Traceback" not in result.stderr, result


def test_few_sequences_are_left_over():
    assert [validation.divided(count, 8) for count in (64, 12, 5, 1, 13)] == [(8, 8), (6, 2), (5, 1), (1, 1), (6, 2)]
    for count in range(1, 200):
        size, number = validation.divided(count, 8)
        assert size <= 8 and number >= 1 and count - size * number < size


def test_a_prompt_has_the_tokens_of_the_text_that_was_learned(tmp_path, monkeypatch):
    """Nothing is added to it and nothing cut, whatever the tokenizer does for others."""
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "a": 1, "b": 2, "[PAD]": 3}, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer.enable_padding(length=8)
    tokenizer.enable_truncation(2)
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    index = _format.Index(5, 4, "0" * 64, {"train": [], "validation": []})
    (tmp_path / "index.json").write_bytes(index.to_bytes())
    seen = []
    monkeypatch.setattr(generate, "continuation", lambda model, tokens, **options: seen.append(tokens) or [])
    options = {"num_tokens": 1, "context": 8, "temperature": 0, "seed": 0}
    assert generate.sample(None, str(tmp_path), "a b b a", **options) == "a b b a"
    generate.sample(None, str(tmp_path), "a <eos>", **options)
    assert seen == [[1, 2, 2, 1], [1, 3, 3, 3]]     # text that spells the end of a text is text, as data_prep has it
    with pytest.raises(UserError, match="no text in UTF-8"):
        generate.sample(None, str(tmp_path), "\udcff", **options)
    Tokenizer(models.Unigram([("a", -1.0)])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="no token for something in it"):
        generate.sample(None, str(tmp_path), "b", **options)


def test_a_text_ends_where_the_model_ends_it():
    """What follows would be another text, and the two would be read as one."""
    class Model:
        context = Cache()

        def __call__(self, tokens):
            return torch.nn.functional.one_hot(tokens + 1, 8).float()

    model = Model()

    options = {"num_tokens": 9, "context": 4, "temperature": 0, "seed": 0}
    assert generate.continuation(model, [1, 2], end=6, **options) == [3, 4, 5]
    assert generate.continuation(model, [1, 2], end=6, **options | {"num_tokens": 2}) == [3, 4]


def test_a_model_that_went_astray_writes_nothing():
    """Of whatever temperature."""
    class Model:
        context = Cache()

        def __call__(self, tokens):
            return torch.full((*tokens.shape, 8), math.nan)


    for temperature in (0, 1):
        with pytest.raises(UserError, match="its training went astray"):
            generate.continuation(Model(), [1], num_tokens=1, end=0, context=4, temperature=temperature, seed=0)


def test_a_loss_beyond_all_numbers_has_a_perplexity():
    assert evaluate.perplexity(0.0) == 1
    assert evaluate.perplexity(5e6) == math.inf
