"""Checksums of files: against disks and programs that change bytes, not against people who do.

XXH3 hashes ten times as many bytes a second as SHA-256, so it costs neither the steps beside which a checkpoint is
written nor the start of a run that reads one; of 2**128 changes it misses one.
https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Protocol

import xxhash


class Sum(Protocol):
    """What takes bytes in, one block after the other."""

    def update(self, data: memoryview, /) -> None: ...
    def hexdigest(self) -> str: ...


WRITTEN = "xxh3_128"
KINDS: dict[str, Callable[[], Sum]] = {     # by the name that stands in a manifest
    WRITTEN: xxhash.xxh3_128,
    "sha256": hashlib.sha256,               # written by version 1
}
