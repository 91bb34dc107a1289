"""Ways to damage a file; `others` are files of the same kind."""

from __future__ import annotations

import os

SPARSE = 1 << 40    # bytes, of which none is on disk


def flip(path, bit):
    """Turn over one bit."""
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def swap(path, others):
    """Let it change places with another file."""
    other = next(other for other in others if other != path)
    held = path.read_bytes()
    path.write_bytes(other.read_bytes())
    other.write_bytes(held)


def to_pipe(path):
    """Put a pipe there, from which nothing ever comes."""
    path.unlink()
    os.mkfifo(path)


def to_directory(path):
    """Put a directory there."""
    path.unlink()
    path.mkdir()


def to_link(path):
    """Put a link there, to what was there."""
    target = path.with_name(f"elsewhere-{path.name}")
    path.rename(target)
    path.symlink_to(target)


DAMAGE = {
    "removed": lambda path, others: path.unlink(),
    "emptied": lambda path, others: path.write_bytes(b""),
    "truncated": lambda path, others: os.truncate(path, path.stat().st_size - 1),
    "halved": lambda path, others: os.truncate(path, path.stat().st_size // 2),
    "extended": lambda path, others: path.write_bytes(path.read_bytes() + b"\0"),
    "sparse": lambda path, others: os.truncate(path, SPARSE),
    "zeroed": lambda path, others: path.write_bytes(b"\0" * path.stat().st_size),
    "flipped": lambda path, others: flip(path, path.stat().st_size * 4),
    "swapped": swap,
    "pipe": lambda path, others: to_pipe(path),
    "directory": lambda path, others: to_directory(path),
    "link": lambda path, others: to_link(path),
}
