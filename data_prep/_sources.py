"""Inputs as people name them -> a sorted list of files. INPUT is a file, a folder or a glob.

    find(["texts/", "more/*.jsonl.zst"])  ->  [Source("more/a.jsonl.zst", kind="jsonl", packing="zstd", ...), ...]

Invariant: the list depends on the names and contents of folders only, not on the order in which a file system lists
them; a file named twice is read once. In folders, only files of known kinds count, hidden ones do not, and links are
followed; a file that is named itself is text, unless its ending says otherwise or what it holds is no text.
"""

from __future__ import annotations

import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, NoReturn

from mpilm.log import UserError, counted, say

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
NAMED_KINDS = {".json": "jsonl"}    # C4 and Dolma; in a folder of source code they are something else
HEAD_BYTES = 64 << 10
UTF_16 = "UTF-16, which iconv -f UTF-16 -t UTF-8 makes UTF-8"
NO_TEXT = {b"\xff\xfe": UTF_16, b"\xfe\xff": UTF_16, b"BZh": "packed by bzip2", b"\xfd7zXZ": "packed by xz",
           b"PK\x03\x04": "a zip archive", b"%PDF-": "PDF, not text"}
READ = ("Read are text and source code (.txt, .md, .py, .c, ...), .jsonl and .parquet, each also with .gz or .zst; "
        "unpack or convert anything else first.")
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
        for path, named in sorted(_expand(os.fspath(given), skipped)):
            found.setdefault(os.path.realpath(path), _source(path, named=named))
    if skipped:
        endings = ", ".join(f"{count} {ending or 'without ending'}" for ending, count in skipped.most_common(6))
        say(f"skipping {counted(skipped.total(), 'file')} of other kinds ({endings}); name a file itself to read it as "
            "text")
    if not found:
        raise UserError(f"No input files in {', '.join(map(str, inputs))}. {READ}")
    return sorted(found.values())


def of_a_file(error: Exception) -> bool:
    """Whether what a file holds may be the reason: Arrow has kinds of errors of its own for that."""
    return isinstance(error, OSError | EOFError | ValueError) or type(error).__module__.startswith("pyarrow")


def _expand(given: str, skipped: Counter[str]) -> Iterator[tuple[str, bool]]:
    """Paths, each with whether it was named: by itself or by a pattern, and not by a folder around it."""
    matches = [given]
    if not os.path.exists(given):
        matches = [path for path in glob.glob(given, recursive=True) if os.path.exists(path)]
        matches = [path for path in matches if os.path.isdir(path) or not _leave_out(os.path.basename(path), skipped)]
    if not matches:
        raise UserError(f"INPUT {given}: no such file or folder, and as a pattern it matches nothing.")
    for match in matches:
        if os.path.isdir(match):
            yield from ((path, False) for path in _walk(match, skipped))
        else:
            yield match, True


def _leave_out(name: str, skipped: Counter[str]) -> bool:
    """Whether it is what Spark and Dask leave beside their files: _SUCCESS, _metadata, .part-0.crc. A file of data that
    is called so is counted, to be told."""
    kind = _kind(name)[0]
    if kind == "text" or not name.startswith((".", "_")):
        return False
    if kind and name.startswith("_"):
        skipped[f"_*{os.path.splitext(name)[1]}"] += 1
    return True


def _walk(folder: str, skipped: Counter[str]) -> Iterator[str]:
    seen = set()    # links may lead back
    for where, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        about = os.stat(where)
        if (about.st_dev, about.st_ino) in seen:
            folders.clear()
            continue
        seen.add((about.st_dev, about.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        unfinished = any(part.startswith("_") and "=" not in part    # _temporary, _delta_log; not _year=2026
                         for part in os.path.relpath(where, folder).split(os.sep))
        for name in names:
            path, kind = os.path.join(where, name), _kind(name)[0]
            if name.startswith(".") or _leave_out(name, skipped) or (unfinished and kind != "text"):
                continue
            if kind and not os.path.exists(path):
                raise UserError(f"{path}: a link to something that is not there. Restore or remove it.")
            if kind and os.path.isfile(path):
                yield path
            elif os.path.isfile(path):
                skipped[os.path.splitext(name)[1]] += 1


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"{error.filename}: {error.strerror}. Make it readable, or leave it out.") from None


def _kind(name: str) -> tuple[str, str]:
    """(kind or "" where the name does not tell, packing)."""
    stem, ending, packing = _endings(name)
    if ending in KINDS:
        return KINDS[ending], packing
    return "text" if ending in TEXT or stem + ending in NAMES else "", packing


def _endings(name: str) -> tuple[str, str, str]:
    """(stem, ending in small letters, packing)."""
    stem, ending = os.path.splitext(os.path.basename(name))
    packing = PACKINGS.get(ending.lower(), "")
    if packing:
        stem, ending = os.path.splitext(stem)
    return stem, ending.lower(), packing


def _source(path: str, *, named: bool) -> Source:
    kind, packing = _kind(path)
    if named and not kind:
        kind = NAMED_KINDS.get(_endings(path)[1], "")
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise UserError(f"{path}: not an ordinary file. Write what comes from there to a file first.")
        with open(path, "rb") as file:
            head = _unpacked_head(file, packing) if named and kind in ("", "text") else b""
    except OSError as error:
        error.filename = path
        _refuse(error)
    if why := next((why for sign, why in NO_TEXT.items() if head.startswith(sign)), ""):
        raise UserError(f"INPUT {path}: {why}. {READ}")
    if not kind and b"\0" in head:
        raise UserError(f"INPUT {path}: it holds NUL bytes, which no text does. {READ}")
    return Source(path, kind or "text", packing, about.st_size, about.st_mtime_ns)


def _unpacked_head(file: BinaryIO, packing: str) -> bytes:
    """How a file begins; empty where it cannot be unpacked, which whoever reads it tells."""
    if not packing:
        return file.read(HEAD_BYTES)
    import pyarrow

    try:
        return bytes(pyarrow.CompressedInputStream(pyarrow.PythonFile(file), packing).read(HEAD_BYTES))
    except (OSError, ValueError):
        return b""
