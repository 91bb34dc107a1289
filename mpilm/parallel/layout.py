"""Whether a layout is possible, and who holds what in it: arithmetic, before anything is built.

A layout is refused with those that would work. Nothing here needs more than the number of ranks and the configuration.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import product
from math import prod
from typing import NamedTuple

from mpilm.comm import collectives, order
from mpilm.config import Config
from mpilm.log import UserError, counted
from mpilm.model.shape import Shape
from mpilm.parallel import partition, schedules

LINE = 12  # numbers that a message lists at most


class Axes(NamedTuple):
    """Ranks along the axes that split one model; what is left of the ranks is data parallel."""

    pp: int
    cp: int
    tp: int


def check(config: Config, shape: Shape, ranks: int) -> None:
    """Refuse what can't work on so many ranks.

    Raises:
        UserError: Names what was given and what would work.
    """
    parallel, workers = config.parallel, ranks - num_servers(config)
    schedules.get(parallel.schedule)
    require_workers(config, ranks)
    given = Axes(parallel.pp, parallel.cp, parallel.tp)
    if reason := _why_not(config, shape, workers, given):
        raise UserError(f"{_options(given)}: {reason} {_remedy(config, shape, workers, given)}")
    stages(config, shape)


def _why_not(config: Config, shape: Shape, ranks: int, axes: Axes) -> str | None:
    """The first reason against a layout."""
    pp, cp, tp = axes
    if num_servers(config) and prod(axes) > 1:
        return "--sync.kind parameter_server wants a whole model on each worker."
    if ranks % prod(axes):
        if cp == tp == 1:
            return f"{counted(ranks, 'rank')} can't be divided into pipelines of {pp}."
        return f"{counted(ranks, 'rank')} can't be divided into models of {' x '.join(map(str, axes))} (pp x cp x tp)."
    return (_stages_why_not(config, shape, pp) or _context_why_not(config, cp) or _tensor_why_not(config, shape, cp, tp)
            or _slots_why_not(config, ranks // prod(axes)) or _collective_why_not(config, ranks // (pp * tp)))


def _stages_why_not(config: Config, shape: Shape, pp: int) -> str | None:
    parts = pp * num_chunks(config)
    if parts > shape.units:
        return (f"the model has {shape.units} pieces to deal ({shape.layers} blocks, the embedding, the head), "
                f"and {parts} stages are wanted.")
    if parts > 1 and shape.tied_embeddings:
        return "--model.tied_embeddings true wants embedding and head on one stage, so pp 1 without chunks, or false."
    return None


def _context_why_not(config: Config, cp: int) -> str | None:
    length, chunks = config.data.sequence_length, 2 * cp
    if cp == 1 or length % chunks == 0:
        return None
    return (f"{cp} ranks share a sequence as {chunks} chunks of equal length, and --data.sequence_length {length} is "
            f"no multiple of {chunks}; {-(-length // chunks) * chunks} is.")


def _tensor_why_not(config: Config, shape: Shape, cp: int, tp: int) -> str | None:
    length = config.data.sequence_length
    shared = {"--model.heads": (shape.heads, tp), "--model.kv_heads": (shape.kv_heads, tp),
              "--model.hidden": (shape.hidden, tp), "--model.vocab_size": (shape.vocab_size, tp),
              "--data.sequence_length": (length, cp * tp)}
    for option, (count, ranks) in shared.items():
        if tp > 1 and count % ranks:
            return (f"{tp} ranks share every layer in equal parts, and {option} {count} is no multiple of {ranks}; "
                    f"{-(-count // ranks) * ranks} is.")
    return None


def _slots_why_not(config: Config, dp: int) -> str | None:
    try:
        slots(config, dp, reproducible=config.run.reproducible)
    except UserError as error:
        return str(error)
    return None


def _collective_why_not(config: Config, replicas: int) -> str | None:
    name = config.sync.collective
    return None if name == "auto" or num_servers(config) else collectives.get(name).why_not(replicas)


def require_workers(config: Config, ranks: int) -> None:
    """Refuse more servers than there is work for.

    Raises:
        UserError: All ranks would be servers.
    """
    servers = num_servers(config)
    if servers >= ranks:
        raise UserError(f"--sync.servers {servers}: with {counted(ranks, 'rank')} nobody would be left to train. Start "
                        f"{servers + 1} ranks or more" + (f", or give {ranks - 1} or fewer." if ranks > 1 else "."))


def fitted(config: Config, shape: Shape, ranks: int) -> tuple[Config, int] | None:
    """What those can go on with whom a death has left: a configuration, and how many ranks it takes; None: nothing.

    Pipelines stay as long as they were, as many as there are ranks for, or become shorter where not even one is left.
    The ranks that share sequences or layers do not become fewer, because that would change the bits.
    """
    for pp in reversed(_divisors(config.parallel.pp)):
        split = config.parallel.split if pp == config.parallel.pp else ""
        changed = replace(config, parallel=replace(config.parallel, pp=pp, split=split))
        for count in range(ranks, num_servers(config), -1):
            axes = Axes(pp, config.parallel.cp, config.parallel.tp)
            if _why_not(changed, shape, count - num_servers(config), axes) is None:
                return changed, count
    return None


def describe(config: Config, ranks: int) -> dict[str, int]:
    """How so many ranks are used."""
    parallel, servers = config.parallel, num_servers(config)
    split = {"pp": parallel.pp, "cp": parallel.cp, "tp": parallel.tp}
    return {"dp": (ranks - servers) // prod(split.values()), **split, **({"servers": servers} if servers else {})}


def num_servers(config: Config) -> int:
    """The first ranks, which train nothing."""
    return config.sync.servers if config.sync.kind == "parameter_server" else 0


def staleness(config: Config) -> float:
    """How many steps replicas may be apart; without servers they never are."""
    return float(config.sync.staleness) if num_servers(config) else 0.0


def slots(config: Config, dp: int, *, reproducible: bool) -> list[range]:
    """The slots of every replica, of `dp`.

    Raises:
        UserError: There are too few, or in reproducible mode not a power of two.
    """
    number = config.data.global_batch_size // config.data.micro_batch_size
    deal: Callable[[int, int], list[range]] = order.runs if reproducible else order.even_runs
    if reproducible and _in_turns(config, dp):
        deal = order.turns
    dealt = deal(number, dp)
    if number < dp:
        raise UserError(f"{dp} replicas of the model, but a step has {number} micro-batches (--data.global_batch_size "
                        "/ --data.micro_batch_size): lower the one or raise the other, or start fewer ranks.")
    return dealt


def _in_turns(config: Config, dp: int) -> bool:
    """Gradients that are summed over ranks before they are summed over slots: see sync/sharded.py."""
    return config.sync.kind == "sharded" and config.sync.level > 1 and dp & (dp - 1) == 0


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
        costs = partition.costs(shape, tokens=data.micro_batch_size * data.sequence_length // config.parallel.cp,
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


def _options(axes: Axes) -> str:
    """The axes as they are typed; pp stands for them all when nothing is split."""
    typed = [f"--parallel.{name} {size}" for name, size in axes._asdict().items() if size > 1]
    return " ".join(typed) or f"--parallel.pp {axes.pp}"


def _remedy(config: Config, shape: Shape, ranks: int, given: Axes) -> str:
    """What one option could be changed to; else whole layouts."""
    def works(axes: Axes) -> bool:
        return _why_not(config, shape, ranks, axes) is None

    changes = []
    for name, size in given._asdict().items():
        fitting = [other for other in _divisors(ranks) if works(given._replace(**{name: other}))]
        if fitting and (size > 1 or prod(given) == 1):
            changes.append(f"--parallel.{name} may be {_listed(fitting)}")
    if not changes:
        layouts = [Axes(*sizes) for sizes in product(_divisors(ranks), repeat=len(given))]
        changes = [_listed([_options(axes) for axes in layouts if works(axes)])]
        if not changes[0]:
            return f"No layout works with {counted(ranks, 'rank')} and these options."
        return f"With {counted(ranks, 'rank')} and these options these would work: {changes[0]}."
    return f"With {counted(ranks, 'rank')} and these options {'; or '.join(changes)}."


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _listed(choices: Sequence[object]) -> str:
    words = [str(choice) for choice in choices[:LINE]] + (["..."] if len(choices) > LINE else [])
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} or {words[-1]}" if words else ""
