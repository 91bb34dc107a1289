"""Who takes part in the benchmark of shared layers: a menu like `_contenders`, the first word of the name is the file.

    mpilm-tp                all ranks share every layer (`--parallel.tp`), the whole batch as one micro-batch
    mpilm-dp                a yardstick: data parallel on the same ranks, a rank's share as one micro-batch
    torch-tp                DTensor's parallelize_module over Gloo, of transformers' Llama, as people run it: columns,
                            rows, the vocabulary of embedding, head and loss; the sequence between them
    torch-tp-compile        the same compiled, which goes only without dividing the sequence
    torch-...-tuned         with the malloc settings that ours starts under

All in bf16.
"""

from __future__ import annotations

from mpilm.bench._contenders import TUNED, Who, parse

PEERS = ("torch-tp", "torch-tp-compile")
MEASURED = ("mpilm-tp", "mpilm-dp", *PEERS, *(f"{name}-{TUNED}" for name in PEERS))


def names() -> list[str]:
    """All there are to be named by --who."""
    return list(MEASURED)


def who(name: str) -> Who:
    """Take a name apart.

    Raises:
        UserError: There is no such contender.
    """
    return parse(name, known=names(), folder=__name__)
