"""Who takes part in the benchmark of divided memory: a menu like `_contenders`, the first word of the name is the file.

    mpilm-allreduce                   ours, nothing divided but what a node's ranks share anyway
    mpilm-sharded1, -2, -3            ours, at that level
    mpilm-...-ring                    likewise, by messages: nothing is shared in the node
    fsdp2                             fully_shard over Gloo, of transformers' Llama, as people run it; weights go after
                                      the forward pass
    fsdp2-ours                        fully_shard over Gloo, of our model and its compiled blocks
    fsdp2-...-kept                    weights stay from the forward to the backward pass
    fsdp2-...-tuned                   with the malloc settings that ours starts under

All in bf16 with float32 masters, a rank's share of the batch as one micro-batch.
"""

from __future__ import annotations

from mpilm.bench._contenders import TUNED, Who, parse

KINDS = ("allreduce", "sharded1", "sharded2", "sharded3")
PEERS = ("fsdp2", "fsdp2-kept", "fsdp2-ours", "fsdp2-ours-kept")
MEASURED = ("mpilm-allreduce", "mpilm-sharded1", "mpilm-sharded2", "mpilm-sharded3", "mpilm-sharded3-ring", "fsdp2",
            "fsdp2-tuned", "fsdp2-ours", "fsdp2-ours-tuned")


def names() -> list[str]:
    """All there are to be named by --who."""
    ours = [f"mpilm-{kind}{by}" for kind in KINDS for by in ("", "-ring")]
    return [*ours, *PEERS, *(f"{name}-{TUNED}" for name in PEERS)]


def who(name: str) -> Who:
    """Take a name apart.

    Raises:
        UserError: There is no such contender.
    """
    return parse(name, known=names(), folder=__name__)
