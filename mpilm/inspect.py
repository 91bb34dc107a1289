"""What is in a checkpoint: python -m mpilm.inspect PATH [--json].

    python -m mpilm.inspect runs/demo                              the newest good checkpoint of a run
    python -m mpilm.inspect runs/demo/checkpoints/step-00000100    this one

Every file is compared with its checksum first. `weights_sha256` depends on the weights alone: two runs have the same
one if and only if their weights have the same bits, whatever number of ranks wrote them. Needs neither MPI nor torch.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpilm.log import UserError, counted, say

if TYPE_CHECKING:
    from mpilm.checkpoint import Reader

CHECKPOINTS = "checkpoints"


def main(argv: Sequence[str] | None = None) -> int:
    """Print what PATH holds; the exit code: 0, or 2 if there is nothing good."""
    parser = argparse.ArgumentParser(prog="python -m mpilm.inspect", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", metavar="PATH", type=Path, help="a run directory or a checkpoint")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of lines")
    options = parser.parse_args(argv)
    try:
        about = describe(find(options.path))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    say(json.dumps(about) if options.json else text(about))
    return 0


def find(path: Path) -> Reader:
    """The checkpoint at `path`, or the newest good one of the run there.

    Raises:
        UserError: There is none.
    """
    from mpilm.checkpoint import Alone, newest, verified

    if (path / CHECKPOINTS).is_dir():
        path = path / CHECKPOINTS
    elif not path.is_dir():
        raise UserError(f"{path}: there is no such directory. Give a run directory or one of its checkpoints.")
    elif path.name.startswith("step-") or (path / "manifest.json").exists():
        return verified(path, Alone())
    reader = newest(path, Alone())
    if reader is None:
        raise UserError(f"{path}: no checkpoint there yet. Give a run directory or one of its {CHECKPOINTS}/step-*.")
    return reader


def describe(reader: Reader) -> dict[str, Any]:
    """All that is worth knowing, as plain values. Sizes in bytes."""
    from mpilm.checkpoint import parameters, weights_sha256

    manifest = reader.manifest
    return {
        "path": str(reader.path), "step": reader.step, "parameters": parameters(reader),
        "weights_sha256": weights_sha256(reader), "tensors": len(manifest.tensors), "ranks": manifest.ranks,
        "files": len(manifest.files), "bytes": sum(file.bytes for file in manifest.files.values()), "meta": reader.meta,
    }


def text(about: dict[str, Any]) -> str:
    """The same as lines."""
    lines = [
        ("checkpoint", about["path"]),
        ("step", f"{about['step']:,}"),
        ("parameters", f"{about['parameters']:,}"),
        ("weights_sha256", about["weights_sha256"]),
        ("tensors", f"{about['tensors']:,}, weights and optimizer state, {about['bytes'] / 1e6:,.1f} MB"),
        ("written", f"by {counted(about['ranks'], 'rank')} into {counted(about['files'], 'file')}"),
        *_flat(about["meta"]),
    ]
    width = 2 + max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}{value}" for name, value in lines)


def _flat(meta: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """A line for each dictionary, with its plain values; dictionaries inside it come after it."""
    for key, value in meta.items():
        if not isinstance(value, dict):
            yield prefix + key, str(value)
            continue
        plain = {name: inner for name, inner in value.items() if not isinstance(inner, dict)}
        if plain:
            yield prefix + key, ", ".join(f"{name} {inner}" for name, inner in plain.items())
        yield from _flat({name: inner for name, inner in value.items() if name not in plain}, f"{prefix}{key}.")


if __name__ == "__main__":
    sys.exit(main())
