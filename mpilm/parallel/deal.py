"""Somebody's list of layers dealt to the stages of a pipeline, and refused where that can't be done.

    layers = named(nn.Sequential(...))                # {"0": Linear, "1": ReLU, ...}
    stages(config, layers, seen, torch.float32)       # [range(0, 1), range(1, 5)]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from mpilm.comm import order
from mpilm.config import Config
from mpilm.log import UserError, counted
from mpilm.parallel import layout, partition, schedules, trial
from mpilm.parallel.trial import Seen


def named(layers: nn.Sequential | Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Name -> layer, in order, as nn.Sequential names them; the same layer may come more than once.

    Raises:
        UserError: There are none, or something else is among them.
    """
    model = layers if isinstance(layers, nn.Sequential) else nn.Sequential(*_modules(layers))
    found = {name: layer for name, layer in model.named_modules(remove_duplicate=False) if name and "." not in name}
    if not found:
        raise UserError("There are no layers: give an nn.Sequential, or a list of modules.")
    return found


def _modules(layers: Sequence[nn.Module]) -> list[nn.Module]:
    if isinstance(layers, nn.Module) or not all(isinstance(layer, nn.Module) for layer in layers):
        raise UserError("Layers are an nn.Sequential or a list of modules, each of which takes a tensor and makes one.")
    return list(layers)


def check(config: Config, layers: int, ranks: int) -> None:
    """Refuse what can't work with so many layers on so many ranks.

    Raises:
        UserError: Names what was given and what would work.
    """
    parallel, run = config.parallel, config.run
    schedules.get(parallel.schedule)
    if parallel.cp > 1 or parallel.tp > 1:
        raise UserError(f"--parallel.cp {parallel.cp} --parallel.tp {parallel.tp}: layers of your own are not split "
                        "inside; give 1 and 1.")
    if run.compile == "on":
        raise UserError("--run.compile on: layers of your own are run as they are; compile those you want compiled.")
    fitting = [pp for pp in range(1, ranks + 1)
               if ranks % pp == 0 and pp * layout.num_chunks(config) <= layers and _slots(config, ranks // pp) is None]
    if parallel.pp not in fitting:
        stages, reason = parallel.pp * layout.num_chunks(config), _slots(config, max(1, ranks // parallel.pp))
        why = (f"{counted(ranks, 'rank')} can't be divided into pipelines of {parallel.pp}." if ranks % parallel.pp
               else f"{stages} stages are wanted, and there are {layers} layers." if stages > layers else reason)
        remedy = f"may be {', '.join(map(str, fitting))}" if fitting else "has no value that would work"
        raise UserError(f"--parallel.pp {parallel.pp}: {why} With {counted(ranks, 'rank')} and these options it "
                        f"{remedy}.")


def _slots(config: Config, dp: int) -> str | None:
    try:
        layout.slots(config, dp, reproducible=config.run.reproducible)
    except UserError as error:
        return str(error)
    return None


def stages(config: Config, layers: Mapping[str, nn.Module], seen: Sequence[Seen], dtype: torch.dtype) -> list[range]:
    """The layers of every stage, by cost or by hand.

    Raises:
        UserError: `parallel.split` does not fit, stages would share a parameter, or a cut does not carry `dtype`.
    """
    number = config.parallel.pp * layout.num_chunks(config)
    if config.parallel.split:
        dealt = _by_hand(config.parallel.split, number, len(layers))
    else:
        dealt = partition.cheapest(trial.costs(list(layers.values()), seen), number)
    for units in dealt[1:]:
        before = seen[units.start - 1]
        if before.dtype != dtype:
            raise UserError(f"Layer {units.start - 1} makes {before.dtype}, and stages hand on {dtype} only: cut "
                            "elsewhere with --parallel.split, which takes the number of layers of every stage.")
    _require_own_parameters(layers, dealt)
    return dealt


def _by_hand(text: str, number: int, layers: int) -> list[range]:
    counts = [int(count) if count.strip().isdecimal() else 0 for count in text.split(",")]
    if len(counts) != number or sum(counts) != layers or not all(counts):
        example = ",".join(str(len(run)) for run in order.even_runs(layers, number))
        raise UserError(f"--parallel.split {text}: give how many of the {layers} layers each of the {number} stages "
                        f"gets, such as {example}.")
    return [range(sum(counts[:stage]), sum(counts[:stage + 1])) for stage in range(number)]


def _require_own_parameters(layers: Mapping[str, nn.Module], dealt: Sequence[range]) -> None:
    held = [{id(tensor) for tensor in nn.ModuleDict(part).state_dict(keep_vars=True).values()}
            for part in parts(layers, dealt)]
    for one, mine in enumerate(held):
        for other, theirs in enumerate(held[:one]):
            if mine & theirs:
                raise UserError(f"Stages {other} and {one} would share a parameter: deal the layers that use it to one "
                                "stage with --parallel.split, or give --parallel.pp 1.")


def parts(layers: Mapping[str, nn.Module], dealt: Sequence[range]) -> list[dict[str, nn.Module]]:
    """Name -> layer of every stage."""
    names = list(layers)
    return [{names[unit]: layers[names[unit]] for unit in units} for units in dealt]
