"""Who takes part in the benchmark of parameter servers: a menu like `_contenders`, of two processes each.

    mpilm-server         a server and a worker, on a core each
    mpilm-alone          allreduce on one rank, on the core that the worker has; the other process looks on
    mpilm-...-fp32       in float32, so parameters come back in twice as many bytes
"""

from __future__ import annotations

from mpilm.bench._contenders import Who, parse

MEASURED = ("mpilm-server", "mpilm-alone")
PROCESSES = 2


def names() -> list[str]:
    """All there are to be named by --who."""
    return [*MEASURED, *(f"{name}-fp32" for name in MEASURED)]


def who(name: str) -> Who:
    """Take a name apart.

    Raises:
        UserError: There is no such contender.
    """
    return parse(name, known=names(), folder=__name__)
