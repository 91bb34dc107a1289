"""Files that appear whole or not at all, and hashes of files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from mpilm.named import named

READ_BYTES = 8 << 20


def sync(path: Path) -> None:
    """Force a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, even if the power goes."""
    temporary = path.with_name(path.name + ".tmp")
    with named(temporary):
        temporary.write_bytes(content)
        sync(temporary)
        os.replace(temporary, path)


def write_json(path: Path, value: object) -> None:
    """Write a JSON file that appears whole or not at all, even if the power goes."""
    write_bytes(path, json.dumps(value).encode())


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, read piecewise."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()
