"""Tokenizers of any kind: the tokens that a model learns, and what is refused."""

import numpy as np
import pytest
from mpi4py import MPI
from tokenizers import Tokenizer, models, pre_tokenizers

from data_prep.encode import Settings, encode
from mpilm.data.shards import Dataset
from mpilm.log import UserError
from tests.data_prep.texts import some, train, write

pytestmark = pytest.mark.serial
DOCUMENTS = some(300)


def alone(inputs, tokenizer, to):
    """Encode on this rank by itself."""
    return encode(inputs, tokenizer, to, MPI.COMM_SELF, settings=Settings(validation=0))


@pytest.mark.parametrize("content", [None, "", "{}", "\0", '{"model": {"type": "BPE", "vocab": {}, "merges": []}}'])
def test_not_a_tokenizer(tmp_path, content):
    write(tmp_path / "in", DOCUMENTS[:5], "jsonl")
    path = tmp_path / "bad.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=r"--tokenizer .*bad\.json: .*data_prep\.tokenizer"):
        alone([tmp_path / "in"], path, tmp_path / "out")


def test_any_tokenizer_json(tmp_path):
    """Another model, no byte alphabet, a large vocabulary, padding and truncation switched on: all of no matter."""
    vocab = {"[UNK]": 0, "a": 1, "b": 2, "</s>": 70_000}
    other = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    other.enable_padding(length=64)
    other.enable_truncation(1)
    other.save(str(tmp_path / "other.json"))
    write(tmp_path / "in", ["a", "b"], "jsonl")
    data = Dataset.open(alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "out"))
    assert (data.vocab_size, data.end_of_text, data.dtype) == (70_001, 70_000, np.uint32)
    assert data.read(0, data.num_tokens).tolist() == [1, 70_000, 2, 70_000]


def test_no_end_of_text(tmp_path):
    Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).save(str(tmp_path / "other.json"))
    write(tmp_path / "in", ["a"], "jsonl")
    with pytest.raises(UserError, match="--end_of_text"):
        alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "out")


def test_a_tokenizer_that_has_no_token_for_what_it_does_not_know(tmp_path):
    Tokenizer(models.Unigram([("a", -1.0), ("</s>", -2.0)])).save(str(tmp_path / "other.json"))
    write(tmp_path / "in", ["a", "b"], "jsonl")
    with pytest.raises(UserError, match=r"cannot encode this text .*unk"):
        alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "out")


def test_bpe_that_leaves_out_what_it_does_not_know(tmp_path):
    """In silence, by itself; white space, which many leave out on purpose, does not count."""
    model = models.BPE({"a": 0, "b": 1, "ab": 2, "</s>": 3}, [("a", "b")])
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "other.json"))
    write(tmp_path / "in", ["ab a", "b"], "jsonl")
    assert Dataset.open(alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "out")).num_tokens == 5
    write(tmp_path / "in", ["ab xyz"], "txt")
    with pytest.raises(UserError, match="it has no token for 'xyz'"):
        alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "more")


def test_a_tokenizer_that_draws_lots(tmp_path):
    """The same text has the same tokens, as without."""
    tokenizer = train(tmp_path, DOCUMENTS)
    drawing = Tokenizer.from_file(str(tokenizer))
    drawing.model.dropout = 0.5
    drawing.save(str(tmp_path / "drawing.json"))
    write(tmp_path / "in", DOCUMENTS, "jsonl")
    usual, drawn = (Dataset.open(alone([tmp_path / "in"], path, tmp_path / f"out-{path.stem}"))
                    for path in (tokenizer, tmp_path / "drawing.json"))
    assert usual.num_tokens == drawn.num_tokens
    assert np.array_equal(usual.read(0, usual.num_tokens), drawn.read(0, usual.num_tokens))


def test_a_text_that_ends_itself_by_an_ordinary_token_is_told(tmp_path, capsys):
    Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "</s>": 2}, unk_token="[UNK]")).save(str(tmp_path / "other.json"))
    write(tmp_path / "in", ["a", "</s>", "a"], "jsonl")
    alone([tmp_path / "in"], tmp_path / "other.json", tmp_path / "out")
    assert "the token that ends a document is spelled in 1 piece of text" in capsys.readouterr().err
