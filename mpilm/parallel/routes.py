"""Which message a pass waits for and which one it sends: arithmetic on stages.

Stage s lives on rank s % ranks, as that rank's chunk s // ranks. Activations go from stage s to s + 1, their gradients
back; both ends name a message by its direction, the stage that receives it, and the micro-batch.
"""

from __future__ import annotations

from mpilm.parallel.schedules import Action, Kind

Message = tuple[Kind, int, int]     # (FORWARD or BACKWARD, receiving stage, micro-batch)


def needs(action: Action, rank: int, ranks: int, stages: int) -> Message | None:
    """The message that a pass must wait for; None: it has all it needs."""
    stage = action.chunk * ranks + rank
    if action.kind is Kind.FORWARD:
        return (Kind.FORWARD, stage, action.micro_batch) if stage > 0 else None
    if action.kind is Kind.WEIGHT:
        return None
    return (Kind.BACKWARD, stage, action.micro_batch) if stage < stages - 1 else None


def gives(action: Action, rank: int, ranks: int, stages: int) -> Message | None:
    """The message that a pass sends; None: nobody waits for it."""
    stage = action.chunk * ranks + rank
    if action.kind is Kind.FORWARD:
        return (Kind.FORWARD, stage + 1, action.micro_batch) if stage < stages - 1 else None
    if action.kind is Kind.WEIGHT:
        return None
    return (Kind.BACKWARD, stage - 1, action.micro_batch) if stage > 0 else None


def cut(message: Message) -> int:
    """Where a message crosses: the stage that its activations enter, or that their gradients leave."""
    kind, stage, _ = message
    return stage if kind is Kind.FORWARD else stage + 1
