"""Who may go on: the clock of every worker, the version of the parameters, and the bound between them. No MPI.

    clocks = Clocks(workers=3, staleness=2, start=0, steps=100, meets=lambda step: step % 50 == 0)
    clocks.advance([1])         worker 1's gradient has been applied: who is sent parameters now

A worker that has done c steps begins the next one only when everyone has done c - s (the stale-synchronous model, Ho et
al., NIPS 2013): s = 0 keeps all together, infinity lets everyone go. At steps that `meets` names everyone waits for
everyone, whatever s is, because something is done there with one set of parameters.

Every update is a version, also one that is left out because its gradient was not finite. How stale a gradient is says
how many updates came between the parameters it was computed on and those it is applied to.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence


class Clocks:
    """Every server keeps the same ones, because all of them apply the same gradients in the same order.

    Args:
        workers: How many there are.
        staleness: How many steps one may be ahead of the slowest; 0: a step of all is one update.
        start: Steps that all have done.
        steps: After which a worker ends.
        meets: Whether all wait for each other after a step.
        shares: What each worker does of a step, in any unit; none: as much as any other.

    Attributes:
        done: Steps of each worker whose gradients have been applied.
        version: Updates so far, of this job.
        computing: Workers that have parameters, so that a gradient will come.
    """

    def __init__(self, workers: int, *, staleness: float, start: int, steps: int, meets: Callable[[int], bool],
                 shares: Sequence[int] = ()) -> None:
        self.staleness, self.steps, self.meets = staleness, steps, meets
        self.shares = list(shares) or [1] * workers
        self.done = [start] * workers
        self.version = 0
        self.pulled = [0] * workers
        self.computing: set[int] = set()
        self.waiting = set(range(workers))

    @property
    def together(self) -> bool:
        """All gradients of a step make one update."""
        return self.staleness == 0

    @property
    def slowest(self) -> int:
        """Steps that everyone has done."""
        return min(self.done)

    @property
    def met(self) -> bool:
        """Everyone has done the same steps, and nobody went on before all had."""
        return self.slowest == max(self.done) and self._meets(self.slowest)

    @property
    def over(self) -> bool:
        """All steps are done."""
        return self.slowest >= self.steps

    @property
    def mean(self) -> float:
        """Steps of the whole batch that have been done: the mean over workers, by what each does of one."""
        return sum(done * share for done, share in zip(self.done, self.shares, strict=True)) / sum(self.shares)

    def lag(self, members: Sequence[int]) -> int:
        """How stale the gradients of `members` are; those that are applied together are equally so."""
        return max(self.version - self.pulled[worker] for worker in members)

    def advance(self, members: Sequence[int]) -> list[int]:
        """The gradients of `members` make one update. Returns who is to be sent parameters after it."""
        for worker in members:
            self.done[worker] += 1
            self.computing.remove(worker)
            self.waiting.add(worker)
        self.version += 1
        return self.release()

    def release(self) -> list[int]:
        """Who waits and need not wait longer."""
        free = sorted(worker for worker in self.waiting if self._may_go_on(self.done[worker]))
        self.waiting.difference_update(free)
        for worker in free:
            self.pulled[worker] = self.version
            if not self.over:
                self.computing.add(worker)
        return free

    def _may_go_on(self, done: int) -> bool:
        return self.slowest >= done - (0 if self._meets(done) else self.staleness)

    def _meets(self, step: int) -> bool:
        return self.together or step >= self.steps or self.meets(step)
