"""The built-in corpus: the source of the running interpreter's standard library, real text that every machine has.

    path = corpus.prepare("corpus", comm)       # corpus/python-3.11.7, ready for --data.path

Deterministic: one interpreter, one corpus. A second call finds the first one's result.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep import tokenizer
from data_prep.encode import Settings, encode
from mpilm.launch import on_root
from mpilm.log import UserError, say

if TYPE_CHECKING:
    from mpi4py import MPI

VOCAB_SIZE = 8192
VALIDATION = 0.05  # a library of 660 files has about 30 that fall to it; of 2 % it may be 6
SAMPLE_MIB = 10.0
WAIT_S = 600.0
OTHERS = frozenset({"site-packages", "dist-packages", "__pycache__"})


def prepare(directory: str | Path, comm: MPI.Comm, *, threads: int = 1, files: list[Path] | None = None) -> Path:
    """Make the corpus in a folder, or find it there complete, and return the dataset's folder.

    Collective over `comm`; the ranks share the encoding.

    Args:
        directory: Where the corpus goes; made where it is missing.
        comm: The ranks that share the work.
        threads: Threads of this rank.
        files: What to make it from instead of the standard library.

    Raises:
        UserError: The interpreter came without the source of its library; the folder cannot be written.
    """
    folder = Path(directory) / f"python-{platform.python_version()}"
    vocabulary = folder.with_name(f"{folder.name}-tokenizer.json")
    if on_root(comm, lambda: _is_ready(folder)):
        return folder
    sources = files or on_root(comm, library)
    on_root(comm, lambda: _train(sources, vocabulary, threads))
    settings = Settings(validation=VALIDATION)
    return encode(sources, vocabulary, folder, comm, settings=settings, threads=threads, wait_s=WAIT_S)


def library() -> list[Path]:
    """The .py files of the standard library, sorted.

    Raises:
        UserError: There are none.
    """
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(path for path in folder.rglob("*.py") if not OTHERS & set(path.parts[len(folder.parts):]))
    if not files:
        raise UserError(f"{folder}: this Python came without the source of its library. Give text of your own with "
                        "--data.path (see data_prep.encode).")
    return files


def _is_ready(folder: Path) -> bool:
    from mpilm.data._format import INDEX
    from mpilm.data.shards import Dataset

    if not (folder / INDEX).exists():
        return False
    for split in ("train", "validation"):
        Dataset.open(folder, split=split)
    return True


def _train(files: list[Path], to: Path, threads: int) -> None:
    try:
        to.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{to.parent}: {error.strerror}. Name a folder that can be made and written to.") from None
    if not to.exists():
        say("preparing the built-in corpus: the source of Python's standard library")
        tokenizer.train(files, to, vocab_size=VOCAB_SIZE, sample_mib=SAMPLE_MIB, threads=threads)
