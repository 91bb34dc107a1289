"""Who takes part in the pipeline benchmark: a menu like `_contenders`, the first word of the name is the file.

    mpilm-1f1b, -zb, -gpipe, -interleaved     our pipeline over all ranks, by that schedule
    mpilm-dp                                  data parallel on the same ranks, the same micro-batches
    mpilm-dp-whole                            likewise, the share of a rank as one micro-batch
    mpilm-...-eager                           without torch.compile
    torch-1f1b, torch-1f1b-compile            torch.distributed.pipelining over Gloo, of transformers' Llama
    torch-1f1b-ours, torch-1f1b-ours-eager    the same of our blocks, compiled or not: nothing but the pipeline differs
    torch-...-tuned                           with the malloc settings that ours starts under

`emulated` is no contender: our executor and messages, with passes that sleep for as long as real ones take.
"""

from __future__ import annotations

from mpilm.bench._contenders import TUNED, Who, parse

MICRO_BATCHES = 8
SCHEDULES = ("1f1b", "zb", "gpipe", "interleaved")
MEASURED = (*(f"mpilm-{name}" for name in SCHEDULES), "mpilm-dp", "mpilm-dp-whole", "torch-1f1b", "torch-1f1b-compile",
            "torch-1f1b-ours")
ASLEEP = ("gpipe", "1f1b", "zb")
EMULATED = Who("emulated", "emulated", frozenset(), False, __name__)


def names() -> list[str]:
    """All there are to be named by --who."""
    plain = [*MEASURED, "torch-1f1b-ours-eager"]
    eager = [f"{name}-eager" for name in MEASURED if name.startswith("mpilm")]
    return [*plain, *eager, *(f"{name}-{TUNED}" for name in plain if name.startswith("torch"))]


def who(name: str) -> Who:
    """Take a name apart.

    Raises:
        UserError: There is no such contender.
    """
    return parse(name, known=names(), folder=__name__)
