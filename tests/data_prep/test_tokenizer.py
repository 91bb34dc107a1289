"""The tokenizer: byte-level, so nothing is lost; deterministic; a sample of a large input is enough."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from data_prep.tokenizer import END_OF_TEXT, train
from mpilm.log import UserError
from tests.data_prep.texts import some, write

pytestmark = pytest.mark.serial
DOCUMENTS = some(200)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write(folder / "in", DOCUMENTS, "txt")
    train([folder / "in"], folder / "tokenizer.json", vocab_size=400)
    return folder / "tokenizer.json"


@given(text=st.text())
def test_any_text_comes_back(trained, text):
    tokenizer = Tokenizer.from_file(str(trained))
    tokenizer.encode_special_tokens = True
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_the_vocabulary(trained):
    tokenizer = Tokenizer.from_file(str(trained))
    assert tokenizer.get_vocab_size() == 400
    assert tokenizer.token_to_id(END_OF_TEXT) == 0
    text = DOCUMENTS[100]
    assert len(tokenizer.encode(text).ids) < len(text.encode()) / 2


def test_the_same_input_gives_the_same_bytes(trained, tmp_path):
    for kind in ("txt", "jsonl", "parquet"):
        write(tmp_path / kind, DOCUMENTS, kind)
        train([tmp_path / kind], tmp_path / f"{kind}.json", vocab_size=400, threads=2)
        assert (tmp_path / f"{kind}.json").read_bytes() == trained.read_bytes()


def test_a_sample(tmp_path, capsys):
    """Of a large input about as much is read as asked for, from all over, and always the same."""
    for number in range(200):
        write(tmp_path / "in", [f"word{number:03d} " * 500], "jsonl", files=1)
        (tmp_path / "in" / "000.jsonl").rename(tmp_path / "in" / f"{number:03d}x.jsonl")
    for name in ("a.json", "b.json"):
        train([tmp_path / "in"], tmp_path / name, vocab_size=1000, sample_mib=0.2)
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert "0.2 million characters" in capsys.readouterr().out
    seen = [number for number in range(200) if f"word{number:03d}"[4:] in (tmp_path / "a.json").read_text()]
    assert min(seen) < 60 and max(seen) > 140


@pytest.mark.parametrize(("options", "words"), [
    ({"vocab_size": 256}, "--vocab_size 256: give a number from 257"),
    ({"vocab_size": 1 << 30}, "--vocab_size"),
    ({"sample_mib": 0}, "--sample_mib 0"),
    ({"sample_mib": float("nan")}, "--sample_mib nan"),
    ({"to": "nowhere/tokenizer.json"}, "--to .*folder that exists"),
    ({"to": "."}, "--to"),
])
def test_settings_that_make_no_sense(tmp_path, options, words):
    write(tmp_path / "in", DOCUMENTS[:3], "txt")
    options = {"vocab_size": 300} | options
    with pytest.raises(UserError, match=words):
        train([tmp_path / "in"], tmp_path / options.pop("to", "t.json"), **options)


def test_nothing_to_learn_from(tmp_path):
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="no documents"):
        train([tmp_path / "empty.txt"], tmp_path / "t.json", vocab_size=300)


def test_too_little_to_fill_the_vocabulary(tmp_path, capsys):
    (tmp_path / "x.txt").write_text("abc")
    train([tmp_path / "x.txt"], tmp_path / "t.json", vocab_size=5000)
    assert "fewer than the 5,000 asked for" in capsys.readouterr().out


def test_as_a_program(tmp_path, run_mpi):
    write(tmp_path / "in", DOCUMENTS, "txt")
    for ranks in (0, 2):
        result = run_mpi(ranks, ["-m", "data_prep.tokenizer", str(tmp_path / "in"), "--vocab_size", "400",
                                 "--to", str(tmp_path / f"{ranks}.json")])
        assert result.rc == 0, result.stderr
    assert (tmp_path / "0.json").read_bytes() == (tmp_path / "2.json").read_bytes()
    result = run_mpi(2, ["-m", "data_prep.tokenizer", str(tmp_path / "nowhere"), "--vocab_size", "400", "--to", "x"])
    assert result.rc == 2
    assert "Traceback" not in result.stderr
