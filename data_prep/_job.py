"""What an encoding is: its inputs, its settings, and what of it is done. Kept on disk, so that a kill costs little.

    DIR/unfinished/job.json    the inputs (name, size, time of change) and settings that everything there belongs to
    DIR/unfinished/...         units and shards that are done (see _parts.py, _assemble.py)
    DIR/job.json               stays beside the finished dataset: the same command again has nothing to do

Work is only ever taken up for the very same job: a changed input or tokenizer is named and refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_prep._sources import Source
from mpilm.data._files import file_sha256, write_bytes, write_json
from mpilm.data._format import INDEX, SPLITS, TOKENIZER, UNFINISHED, read_index
from mpilm.log import UserError

if TYPE_CHECKING:
    from data_prep._parts import Record

JOB = "job.json"
MEANINGS = {"tokenizer": "--tokenizer", "validation": "--validation", "field": "--field", "version": "mpilm's version",
            "end_of_text": "--end_of_text", "shard_mib": "--shard_mib", "unit_bytes": "the unit size",
            "bad_lines": "--bad_lines"}


@dataclass(frozen=True)
class Job:
    """Everything that the output depends on."""

    tokenizer: str  # SHA-256
    end_of_text: int
    validation: float
    field: str
    shard_mib: float
    unit_bytes: int
    bad_lines: str
    sources: list[Source]
    version: int = 1

    def to_json(self) -> dict[str, Any]:
        """As it stands in job.json."""
        values = asdict(self)
        if self.bad_lines == "stop":
            del values["bad_lines"]  # what was encoded before there was a choice is still the same job
        values["sources"] = [list(vars(source).values()) for source in self.sources]
        return values


def is_finished(directory: Path, job: Job) -> bool:
    """Whether the folder holds this job's result; False where there is work to do.

    Raises:
        UserError: The folder holds something else: another dataset, another job's unfinished work.
    """
    if (directory / INDEX).exists():
        _require_same(directory, directory / JOB, job, f"{directory} already holds a dataset")
        _require_whole(directory)
        return True
    unfinished = directory / UNFINISHED / JOB
    if unfinished.exists():
        _require_same(directory, unfinished, job, f"{directory} holds an encoding that was not finished")
    return False


def start(directory: Path, job: Job, *, token_bytes: int) -> dict[int, Record]:
    """Make the folder for unfinished work, or enter it, and return the records of the units that are done."""
    parts = directory / UNFINISHED
    if not (parts / JOB).exists():
        _require_room(directory, job)
        discard(directory)
        parts.mkdir(parents=True)
    write_json(parts / JOB, job.to_json())  # lines may be skipped from here on
    records = (_record(path, token_bytes) for path in sorted(parts.glob("[0-9]*.json")))
    return {record["unit"]: record for record in records if record is not None}


def keep(directory: Path) -> None:
    """Copy the job beside its result. Comes before the index, which says that all is done."""
    write_bytes(directory / JOB, (directory / UNFINISHED / JOB).read_bytes())


def discard(directory: Path) -> None:
    """Remove what only unfinished work needs. Killed in the middle, what is left still names its job, so what does not
    is somebody else's."""
    parts = directory / UNFINISHED
    if parts.exists() and not _others(parts):
        for path in sorted(parts.iterdir(), key=lambda path: path.name == JOB):
            path.unlink()
        parts.rmdir()


def _others(parts: Path) -> list[str]:
    """Names in a folder for unfinished work that no work is known of."""
    names = sorted(path.name for path in parts.iterdir())
    return [] if JOB in names else [name for name in names if name != f"{JOB}.tmp"]


def _require_room(directory: Path, job: Job) -> None:
    """Nothing of somebody else's is where this job's files go."""
    parts, tokenizer, about = directory / UNFINISHED, directory / TOKENIZER, directory / JOB
    found = [parts / name for name in _others(parts)] if parts.is_dir() else []
    if about.exists() and _written(about) != _written_as(job):
        found.append(about)
    if tokenizer.exists() and file_sha256(tokenizer) != job.tokenizer:
        found.append(tokenizer)
    if found:
        raise UserError(f"--to {directory}: {found[0]} is there already and not of this dataset. Name another folder, "
                        "or move it away.")


def _record(path: Path, token_bytes: int) -> Record | None:
    """A unit's record, if its files are there in full."""
    try:
        record: Record = json.loads(path.read_bytes())
        sizes = [(f"{path.with_suffix('')}.{split}.{name}", width * record[split][f"num_{name}"])
                 for split in SPLITS for name, width in (("tokens", token_bytes), ("documents", 8))]
        return record if all(os.path.getsize(file) == size for file, size in sizes) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _require_whole(directory: Path) -> None:
    from mpilm.data._shardfile import check_size

    index = read_index(directory)
    for shard in (shard for shards in index.splits.values() for shard in shards):
        try:
            check_size(directory / shard.file, shard)
        except UserError as error:
            raise UserError(f"{error}\nTo encode it again, remove {directory}; or restore the file.") from None


def _require_same(directory: Path, path: Path, job: Job, what: str) -> None:
    before = _written(path)
    now = _written_as(job)
    # What was encoded so far has no bad lines, so whoever skips them goes on with it.
    if before in (now, {key: value for key, value in now.items() if key != "bad_lines"}):
        return
    raise UserError(f"{what}, made from something else ({_difference(before, now)}). Give another --to, or remove "
                    f"{directory} to encode from the beginning.")


def _written(path: Path) -> Any:
    """A job.json; nothing where it is none."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}


def _written_as(job: Job) -> Any:
    return json.loads(json.dumps(job.to_json()))


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    if not before:
        return "it does not say from what"
    for key, meaning in MEANINGS.items():
        if before.get(key) != now.get(key):
            return f"{meaning} differs"
    old, new = ({tuple(source) for source in values.get("sources", [])} for values in (before, now))
    return f"changed input: {_names(old ^ new)}"


def _names(sources: set[Sequence[Any]]) -> str:
    names = sorted({str(source[0]) for source in sources})
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
