"""A backward pass in two halves: first the gradient of the input, later those of the weights.

Autograd's graph is a web of operations. Those that lie between the output and the input make a path; a weight hangs on
an operation of the path by a thread of its own:

    output <- mm <- mul <- mm <- input          the path: its gradients are computed in `input_gradient`
              |     |      |
              W2    norm   W1                   the threads: computed in `weight_gradients`, from the gradients that
                                                arrived at the operations they hang on, which were kept

PyTorch's own operations compute no more than they are asked for, so every matrix product is done once, in one half or
in the other, with the same operands as in a whole backward pass: the same bits. Only a torch.autograd.Function always
computes all it has; of those that hold weights there is one, the head's, whose backward pass is a multiplication by a
scalar. (The two halves of zero-bubble schedules are those of arXiv 2401.10241.)

    halves = Halves(output, input)
    dx = halves.input_gradient(dy)
    halves.weight_gradients()                   # accumulated into the parameters, hooks and all
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node


class Halves:
    """The backward pass of one graph, from `output` to the leaf `hidden` and to the parameters.

    Without `hidden` there is no path, and everything is the second half.
    """

    def __init__(self, output: Tensor, hidden: Tensor | None) -> None:
        self.output, self.hidden = output, hidden
        self.gradient: Tensor | None = None
        self.threads: list[_Thread] = []
        if hidden is not None:
            assert output.grad_fn is not None, "nothing to differentiate"
            self.threads = [_Thread(node, leaves) for node, leaves in _hanging(output.grad_fn, hidden)]

    def input_gradient(self, gradient: Tensor | None) -> Tensor | None:
        """The gradient of `hidden`, given that of the output (None: the output is a scalar loss)."""
        self.gradient = gradient
        if self.hidden is None:
            return None
        result, = torch.autograd.grad(self.output, self.hidden, gradient, retain_graph=True)
        for thread in self.threads:
            thread.stop_listening()
        return result

    def weight_gradients(self) -> None:
        """Accumulate the gradients of all parameters; the graph is used up."""
        if self.hidden is None:
            torch.autograd.backward(self.output, self.gradient)
        for thread in self.threads:
            thread.pull()
        self.threads.clear()


class _Thread:
    """Parameters that hang on one operation of the path, and the gradients that arrived at it."""

    def __init__(self, node: Node, leaves: list[Tensor]) -> None:
        self.node, self.leaves = node, leaves
        self.arrived: tuple[Tensor | None, ...] = ()
        self.listener: Any = node.register_prehook(self._listen())

    def _listen(self) -> Callable[[tuple[Tensor | None, ...]], None]:
        def hook(gradients: tuple[Tensor | None, ...]) -> None:
            self.arrived = gradients
        return hook

    def stop_listening(self) -> None:
        self.listener.remove()

    def pull(self) -> None:
        known = [(GradientEdge(self.node, number), gradient)
                 for number, gradient in enumerate(self.arrived) if gradient is not None]
        if known:
            edges, gradients = zip(*known, strict=True)
            torch.autograd.backward(edges, gradients, inputs=self.leaves)


def _hanging(root: Node, hidden: Tensor) -> Iterator[tuple[Node, list[Tensor]]]:
    """(operation of the path, the parameters that hang on it), from the output towards the input."""
    order = _upwards(root)
    on_path: set[Node] = set()
    leaves: dict[Node, dict[int, Tensor]] = {}
    for node in order:      # what an operation feeds on comes before it
        below = _below(node)
        leaf = getattr(node, "variable", None)
        if leaf is hidden or any(child in on_path for child in below):
            on_path.add(node)
        else:
            leaves[node] = {id(leaf): leaf} if leaf is not None else {}
            for child in below:
                leaves[node] |= leaves[child]
    seen: set[int] = set()
    for node in reversed(order):
        hanging: dict[int, Tensor] = {}
        if node in on_path:
            for child in _below(node):
                hanging |= leaves.get(child, {})
        assert not seen & set(hanging), "a parameter that is used twice has no gradient of its own to put off"
        seen |= set(hanging)
        if hanging:
            yield node, list(hanging.values())


def _upwards(root: Node) -> list[Node]:
    """Every operation after all those it feeds on. A loop, because graphs are deeper than Python's stack."""
    order: list[Node] = []
    visited = {root}
    stack = [(root, iter(_below(root)))]
    while stack:
        node, children = stack[-1]
        child = next((child for child in children if child not in visited), None)
        if child is None:
            order.append(node)
            stack.pop()
        else:
            visited.add(child)
            stack.append((child, iter(_below(child))))
    return order


def _below(node: Node) -> list[Node]:
    """The operations whose results it takes."""
    return [child for child, _ in node.next_functions if child is not None]
