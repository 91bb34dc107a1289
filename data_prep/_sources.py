"""Inputs as people name them -> a sorted list of files. INPUT is a file, a folder or a glob.

    find(["texts/", "more/*.jsonl.zst"])  ->  [Source("more/a.jsonl.zst", kind="jsonl", packing="zstd", ...), ...]

Invariant: the list depends on the names and contents of folders only, not on the order in which a file system lists
them; a file named twice is read once. In folders, only files of known kinds count, hidden ones do not; a file that is
named itself is text unless its ending says otherwise.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from mpilm.log import UserError, say

PACKINGS = {".gz": "gzip", ".zst": "zstd"}
KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
TEXT = frozenset({
    ".txt", ".text", ".md", ".rst", ".tex", ".org", ".adoc", ".html", ".htm", ".xml", ".css", ".csv", ".tsv",
    ".toml", ".yaml", ".yml", ".ini", ".cfg", ".log", ".py", ".pyi", ".pyx", ".pxd", ".c", ".h", ".cc", ".cpp",
    ".cxx", ".hh", ".hpp", ".hxx", ".cu", ".cuh", ".f", ".for", ".f90", ".f95", ".f03", ".f08", ".inc", ".jl",
    ".r", ".m", ".java", ".kt", ".scala", ".go", ".rs", ".swift", ".js", ".mjs", ".jsx", ".ts", ".tsx", ".php",
    ".rb", ".pl", ".pm", ".lua", ".sh", ".bash", ".zsh", ".fish", ".ps1", ".sql", ".hs", ".ml", ".mli", ".ex",
    ".exs", ".erl", ".clj", ".lisp", ".el", ".scm", ".cs", ".fs", ".vb", ".d", ".nim", ".zig", ".pas", ".ada",
    ".adb", ".ads", ".s", ".asm", ".cmake", ".mk", ".proto", ".thrift",
})
NAMES = frozenset({"Makefile", "README", "LICENSE", "COPYING", "NOTICE", "CHANGES", "AUTHORS", "Dockerfile"})


@dataclass(frozen=True, order=True)
class Source:
    """One input file. `size` and `mtime_ns` tell whether it is still the same file when work is taken up again."""

    path: str
    kind: str  # text, jsonl, parquet
    packing: str  # "", gzip, zstd
    size: int
    mtime_ns: int


def find(inputs: Sequence[str | os.PathLike[str]]) -> list[Source]:
    """The files behind the inputs, sorted by path.

    Raises:
        UserError: An input is not there or matches nothing; there are no files.
    """
    found: dict[str, Source] = {}
    skipped: Counter[str] = Counter()
    for given in inputs:
        for path in sorted(_expand(os.fspath(given), skipped)):
            source = _source(path)
            found.setdefault(os.path.realpath(path), source)
    if skipped:
        endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in skipped.most_common(6))
        say(f"skipping {skipped.total():,} files of other kinds ({endings}); name a file itself to read it as text")
    if not found:
        raise UserError(f"No input files in {', '.join(map(str, inputs))}. Read are text and source code "
                        "(.txt, .md, .py, .c, ...), .jsonl and .parquet, each also with .gz or .zst.")
    return sorted(found.values())


def _expand(given: str, skipped: Counter[str]) -> Iterable[str]:
    if os.path.isdir(given):
        return list(_walk(given, skipped))
    if os.path.exists(given):
        return [given]
    matches = [path for path in glob.glob(given, recursive=True) if os.path.exists(path)]
    if not matches:
        raise UserError(f"INPUT {given}: no such file or folder, and as a pattern it matches nothing.")
    return [path for match in matches
            for path in (_walk(match, skipped) if os.path.isdir(match) else [match])]


def _walk(folder: str, skipped: Counter[str]) -> Iterator[str]:
    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}. Make it readable, or leave it out.") from None

    for where, folders, names in os.walk(folder, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = os.path.join(where, name)
            if name.startswith((".", "_")) and _kind(name)[0] != "text":
                continue  # what Spark and Dask leave beside their files: _SUCCESS, _metadata, .part-0.crc
            if name.startswith(".") or not os.path.isfile(path):
                continue
            if _kind(name)[0]:
                yield path
            else:
                skipped[os.path.splitext(name)[1]] += 1


def _kind(name: str) -> tuple[str, str]:
    """(kind or "" where the name does not tell, packing)."""
    stem, ending = os.path.splitext(os.path.basename(name))
    packing = PACKINGS.get(ending.lower(), "")
    if packing:
        stem, ending = os.path.splitext(stem)
    ending = ending.lower()
    if ending in KINDS:
        return KINDS[ending], packing
    return "text" if ending in TEXT or stem + ending in NAMES else "", packing


def _source(path: str) -> Source:
    kind, packing = _kind(path)
    try:
        about = os.stat(path)
        with open(path, "rb"):
            pass
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}. Make it readable, or leave it out.") from None
    return Source(path, kind or "text", packing, about.st_size, about.st_mtime_ns)
