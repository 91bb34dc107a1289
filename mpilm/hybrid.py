"""Your own layers, trained in pipeline x data parallel: a few lines of Python under mpirun.

    with hybrid.model(nn.Sequential(...), nn.functional.cross_entropy, images, labels, config) as model:
        print(model.epoch())                    # mpirun -np 4 python yours.py

`config.parallel.pp` ranks share the layers; what is left of the ranks are replicas. How MPI is started, and how a
failing rank ends all of them, is the same as for every command (launch.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mpilm.config import Config
from mpilm.launch import session

if TYPE_CHECKING:
    from torch import Tensor, nn

    from mpilm.sequential import Model


@contextmanager
def model(layers: nn.Sequential | Sequence[nn.Module], loss: Callable[[Tensor, Tensor], Tensor], inputs: Any,
          targets: Any, config: Config, *, optimizer: str = "adamw") -> Iterator[Model]:
    """A model over all ranks, ready to train. Collective over all ranks, like everything it does.

    Args:
        layers: Each takes a tensor and makes a tensor. Rank 0's initial values are everyone's. A rank takes over the
            layers of its stages until the end of the `with`. They are put into training mode, whatever mode they came
            in, and into evaluation mode for predictions.
        loss: (output, target) -> mean over a micro-batch, a scalar; such as nn.functional.cross_entropy.
        inputs: [examples, ...], array or tensor, the same on every rank.
        targets: [examples, ...], likewise.
        config: Its sections run (steps, seed, reproducible, precision, threads, max_skipped), data (batch sizes count
            examples), optim, parallel and sync mean what they mean for `mpilm.train`. Precision `auto` is float32.
        optimizer: "adamw" or "sgd".

    Raises:
        UserError: What can't be trained in this way; inside of the session it ends the program, with the reason.
    """
    with session() as world:
        from mpilm import sequential

        built = sequential.build(layers, loss, inputs, targets, config, world, optimizer=optimizer)
        try:
            yield built
            built.wait()
        finally:
            built.free()
