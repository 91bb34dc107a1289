"""Whether a layout is possible, and who holds what in it: arithmetic, before anything is built.

A layout is refused with those that would work. Nothing here needs more than the number of ranks and the configuration.
"""

from __future__ import annotations

from collections.abc import Callable

from mpilm.comm import order
from mpilm.config import Config
from mpilm.log import UserError
from mpilm.model.shape import Shape
from mpilm.parallel import partition, schedules

LINE = 12  # numbers that a message lists at most


def check(config: Config, shape: Shape, ranks: int) -> None:
    """Refuse what can't work on so many ranks.

    Raises:
        UserError: Names what was given and what would work.
    """
    parallel = config.parallel
    schedules.get(parallel.schedule)
    if parallel.tp != 1:
        raise UserError(f"--parallel.tp {parallel.tp}: layers are not split over ranks in this version; give 1.")
    works = [pp for pp in range(1, ranks + 1) if _why_not(config, shape, ranks, pp) is None]
    if reason := _why_not(config, shape, ranks, parallel.pp):
        remedy = f"With {ranks} ranks and these options --parallel.pp may be {_listed(works)}." if works else (
            f"No --parallel.pp works with {ranks} ranks and these options.")
        raise UserError(f"--parallel.pp {parallel.pp}: {reason} {remedy}")
    stages(config, shape)


def _why_not(config: Config, shape: Shape, ranks: int, pp: int) -> str | None:
    parts = pp * num_chunks(config)
    if ranks % pp:
        return f"{ranks} ranks can't be divided into pipelines of {pp}."
    if parts > shape.units:
        return (f"the model has {shape.units} pieces to deal ({shape.layers} blocks, the embedding, the head), "
                f"and {parts} stages are wanted.")
    if parts > 1 and shape.tied_embeddings:
        return "--model.tied_embeddings true wants embedding and head on one stage, so pp 1 without chunks, or false."
    return _slots_why_not(config, ranks // pp)


def _slots_why_not(config: Config, dp: int) -> str | None:
    try:
        slots(config, dp, reproducible=config.run.reproducible)
    except UserError as error:
        return str(error)
    return None


def slots(config: Config, dp: int, *, reproducible: bool) -> list[range]:
    """The slots of every replica, of `dp`.

    Raises:
        UserError: There are too few, or in reproducible mode not a power of two.
    """
    number = config.data.global_batch_size // config.data.micro_batch_size
    deal: Callable[[int, int], list[range]] = order.runs if reproducible else order.even_runs
    dealt = deal(number, dp)
    if number < dp:
        raise UserError(f"{dp} replicas of the model, but a step has {number} micro-batches (--data.global_batch_size "
                        "/ --data.micro_batch_size): lower the one or raise the other, or start fewer ranks.")
    return dealt


def num_chunks(config: Config) -> int:
    """Parts of the model that a rank holds."""
    return config.parallel.chunks if schedules.get(config.parallel.schedule).chunked else 1


def stages(config: Config, shape: Shape) -> list[range]:
    """The units of every stage, over all ranks and chunks.

    Raises:
        UserError: --parallel.split does not fit.
    """
    number = config.parallel.pp * num_chunks(config)
    text = config.parallel.split
    if not text:
        data = config.data
        costs = partition.costs(shape, tokens=data.micro_batch_size * data.sequence_length,
                                sequence_length=data.sequence_length)
        return partition.cheapest(costs, number)
    counts = text.replace(" ", "").split(",")
    if len(counts) != number or not all(count.isdecimal() for count in counts):
        raise UserError(f"--parallel.split {text}: give the blocks of each of the {number} stages, such as "
                        + ",".join(str(len(run)) for run in order.even_runs(shape.layers, number)) + ".")
    return partition.by_hand([int(count) for count in counts], layers=shape.layers)


def of_rank(stages: list[range], rank: int, ranks: int) -> list[range]:
    """The units of each chunk of a rank of the pipeline."""
    return stages[rank::ranks]


def _listed(numbers: list[int]) -> str:
    words = [str(number) for number in numbers[:LINE]] + (["..."] if len(numbers) > LINE else [])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}"
