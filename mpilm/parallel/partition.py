"""Which units of a model go to which pipeline stage: arithmetic only.

A model is a row of units (the embedding, its blocks, the head); a stage is a run of them, and a step is as slow as its
slowest stage. So the runs are chosen by dynamic programming: of all ways to cut, one whose most expensive stage is the
cheapest.

    cheapest([1, 4, 4, 4, 4, 6], 3)       # [range(0, 3), range(3, 5), range(5, 6)]: 9, 8, 6
    by_hand([2, 2], layers=4)             # [range(0, 3), range(3, 6)]: the embedding goes first, the head last
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from mpilm.log import UserError
from mpilm.model import count
from mpilm.model.shape import Shape

# Adding one element of a gradient to the sum over slots moves 12 bytes through memory; a core multiplies about this
# much in the same time.
FLOPS_A_GRADIENT = 100


def costs(shape: Shape, *, tokens: int, sequence_length: int) -> list[float]:
    """What a micro-batch of `tokens` costs each unit, forward and backward, FLOPs or as long as they take."""
    flops = count.unit_flops_per_token(shape, sequence_length)
    return [float(tokens * operations + FLOPS_A_GRADIENT * weights)
            for operations, weights in zip(flops, count.unit_parameters(shape), strict=True)]


def cheapest(costs: Sequence[float], stages: int) -> list[range]:
    """Cut the units into `stages` runs, none empty, so that the largest sum of costs is the smallest possible.

    Of equally good ways the one whose last stages are largest is taken: earlier stages keep more micro-batches.
    """
    units = len(costs)
    assert 1 <= stages <= units, f"{stages} stages of {units} units"
    before = [0.0, *accumulate(costs)]
    # largest[n]: of the first n units over the stages so far, the most expensive stage; cuts: where the last one begins
    largest = [before[n] for n in range(units + 1)]
    cuts = [[0] * (units + 1)]
    for stage in range(1, stages):
        best = [min(((max(largest[cut], before[n] - before[cut]), cut) for cut in range(stage, n)),
                    default=(float("inf"), 0)) for n in range(units + 1)]
        largest = [cost for cost, _ in best]
        cuts.append([cut for _, cut in best])
    ends = [units]
    for row in cuts[:0:-1]:
        ends.append(row[ends[-1]])
    return [range(low, high) for low, high in pairwise([0, *reversed(ends)])]


def by_hand(blocks: Sequence[int], *, layers: int) -> list[range]:
    """Stages of so many blocks each; the first also has the embedding, the last the head.

    Raises:
        UserError: They are not the model's blocks, or a stage is left with nothing.
    """
    given = ",".join(map(str, blocks))
    if sum(blocks) != layers or min(blocks) < 0:
        raise UserError(f"--parallel.split {given} deals {sum(blocks)} blocks, and --model.layers is {layers}: give "
                        "the number of blocks of every stage, in order.")
    ends = [1 + sum(blocks[:stage + 1]) for stage in range(len(blocks))]
    ends[-1] += 1
    runs = [range(low, high) for low, high in pairwise([0, *ends])]
    if not all(map(len, runs)):
        raise UserError(f"--parallel.split {given}: only the first stage (embedding) and the last (head) may have no "
                        "block of their own; give every other one at least 1.")
    return runs
