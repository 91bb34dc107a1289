"""Draw the schedule of a pipeline, who does what when, before it is started: python -m mpilm.plan --show-schedule.

    python -m mpilm.plan --show-schedule zb --parallel.pp 4 --micro-batches 8
    python -m mpilm.plan --show-schedule                       all schedules

Needs neither MPI nor torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from mpilm import launch
from mpilm.log import UserError, counted, say

CELL = 5            # characters of one unit of time
MOST = 256          # ranks, chunks and micro-batches that anybody would scroll through


def main(argv: Sequence[str] | None = None) -> None:
    """Draw what was asked for."""
    parser = argparse.ArgumentParser(prog="python -m mpilm.plan", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show-schedule", "--show_schedule", metavar="NAME", nargs="?", const="all", required=True,
                        help="gpipe, 1f1b, interleaved or zb; without a name all of them")
    parser.add_argument("--parallel.pp", dest="pp", type=int, default=4, help="ranks of the pipeline; default: 4")
    parser.add_argument("--parallel.chunks", dest="chunks", type=int, default=2,
                        help="parts of the model that a rank holds in the interleaved schedule; default: 2")
    parser.add_argument("--micro-batches", "--micro_batches", dest="micro_batches", type=int, default=8,
                        help="of a step, in each replica; default: 8")
    options = parser.parse_args(argv)
    for option, value in {"parallel.pp": options.pp, "parallel.chunks": options.chunks,
                          "micro-batches": options.micro_batches}.items():
        if not 1 <= value <= MOST:
            raise UserError(f"--{option} {value}: give a number from 1 to {MOST}.")
    if (cells := options.pp * options.chunks * options.micro_batches) > MOST**2:
        raise UserError(f"--parallel.pp {options.pp}, --parallel.chunks {options.chunks} and --micro-batches "
                        f"{options.micro_batches} make {cells:,} passes, more than anybody would look at. Lower them.")
    from mpilm.parallel import schedules

    names = list(schedules.MENU) if options.show_schedule == "all" else [options.show_schedule]
    say("\n\n".join(drawing(name, options.pp, options.micro_batches, options.chunks) for name in names))


def drawing(name: str, ranks: int, num_microbatches: int, chunks: int = 1) -> str:
    """A schedule as text: a line for each rank, time from left to right; I, W and F take as long as each other.

    Raises:
        UserError: There is no such schedule.
    """
    from mpilm.parallel import schedules, simulate

    schedule = schedules.get(name, option="show-schedule")
    chunks = chunks if schedule.chunked else 1
    # A chunk is a part of what a stage without chunks would be, and takes that part of its time.
    timeline = simulate.play(schedule.all_ranks(ranks, num_microbatches, chunks),
                             simulate.Cost(1 / chunks, 1 / chunks, 1 / chunks), chunks=chunks)
    held = max(timeline.in_flight(rank) for rank in range(ranks)) / chunks
    lines = [f"{name}: {counted(ranks, 'rank')}" + (f" with {chunks} chunks each" if chunks > 1 else "")
             + f", {num_microbatches} micro-batches; bubble {timeline.bubble / timeline.end:.0%} of the step; "
             f"activations of {held:g} micro-batches at most"]
    for rank, passes in enumerate(timeline.ranks):
        line = ""
        for start, end, action in passes:
            line = line.ljust(round(start * chunks) * CELL)
            line += str(action).ljust(round((end - start) * chunks) * CELL - 1, "-") + " "
        lines.append(f"rank {rank:<{len(str(ranks))}}| {line.rstrip()}")
    return "\n".join(lines)


if __name__ == "__main__":
    launch.command(main, tune=False)    # it only draws
