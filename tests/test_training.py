"""Training steps on any number of ranks against a plain loop in one process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpilm import assemble, connect, sync, trainer
from mpilm.arithmetic import Arithmetic
from mpilm.comm import collectives
from mpilm.comm.transport import ON_HOST
from mpilm.comm.worker import Inline
from mpilm.config import Config, Run, Sync
from mpilm.data.loader import Batch
from mpilm.launch import session
from mpilm.log import UserError
from mpilm.model.gpt import GPT
from mpilm.optim import Update, learning_rate
from tests.helpers import everywhere
from tests.training_cases import LENGTH, SEQUENCES, STEPS, VOCAB, build, configuration, parallel, windows


@pytest.mark.parametrize("reproducible", [False, True])
def test_the_head_knows_what_its_loss_is_divided_by(reproducible):
    """So that no gradient is gone over once more to divide it."""
    with session() as world:
        core = build(configuration(reproducible=reproducible), world)
        told = [part.lm_head.divisor for part in core.parts]
        everywhere(world.comm, told == [core.pipeline.num_slots] and told != [1], str(told))


def plain(config):
    """The loop that everyone knows: one process, the whole batch at once. Returns (losses, norms, parameters)."""
    model = GPT(assemble.shape_of(config, VOCAB))
    model.initialize(seed=config.run.seed)
    groups = [{"params": [p for p in model.parameters() if (p.dim() > 1) is decayed], "weight_decay": decay}
              for decayed, decay in ((True, config.optim.weight_decay), (False, 0.0))]
    optimizer = torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2), eps=config.optim.eps)
    losses, norms = [], []
    for step in range(STEPS):
        tokens = torch.from_numpy(windows(step))
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip or np.inf)))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config.optim, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, norms, {name: p.detach().clone() for name, p in model.named_parameters()}


def possible(name, comm, *, reproducible):
    """Whether a collective can do this at this number of ranks."""
    collective = collectives.get(name)
    able = collective.why_not(comm.size) is None and collective.lacks(ON_HOST) is None
    return able and (collective.fixed_order or not reproducible)


@pytest.mark.parametrize("reproducible", [True, False])
@pytest.mark.parametrize("name", collectives.names())
def test_steps_are_those_of_a_plain_loop(name, reproducible, comm):
    """Losses, gradient norms and every parameter, for every collective."""
    if not possible(name, comm, reproducible=reproducible):
        pytest.skip(f"{name} cannot on {comm.size} ranks")
    config = configuration(name, reproducible=reproducible)
    losses, norms, parameters = plain(config)
    mine = parallel(config)
    np.testing.assert_allclose(mine[0], losses, rtol=1e-5)
    np.testing.assert_allclose(mine[1], norms, rtol=1e-4)
    for parameter, value in parameters.items():
        torch.testing.assert_close(mine[2][parameter], value, rtol=1e-4, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_ranks_hold_the_same_bits(precision, comm):
    """After the steps nobody has drifted, in the fast mode too."""
    losses, norms, parameters = parallel(configuration(reproducible=False), precision=precision)
    bits = b"".join(p.contiguous().view(torch.uint8).numpy().tobytes() for p in parameters.values())
    held = comm.allgather((losses, norms, bits))
    everywhere(comm, all(other == held[0] for other in held))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_size_of_buckets_does_not_change_bits(precision):
    """One bucket for everything, or one for each parameter."""
    runs = [parallel(configuration(bucket_mib=size), precision=precision) for size in (0.01, 0.5, 64.0)]
    for losses, norms, parameters in runs[1:]:
        assert (losses, norms) == runs[0][:2]
        assert all(torch.equal(parameters[name], value) for name, value in runs[0][2].items())


def test_without_a_second_thread_the_bits_are_the_same(monkeypatch):
    """An MPI that is called from one thread only sums after the backward pass instead of beside it."""
    beside = parallel(configuration())
    monkeypatch.setattr(connect, "worker", lambda *_: Inline())
    after = parallel(configuration())
    assert after[:2] == beside[:2]
    assert all(torch.equal(after[2][name], value) for name, value in beside[2].items())


def test_bf16_stays_near_fp32():
    """Half the bits, the same course."""
    exact, rounded = (parallel(configuration(), precision=precision) for precision in ("fp32", "bf16"))
    np.testing.assert_allclose(rounded[0], exact[0], rtol=2e-2)


def test_more_ranks_than_micro_batches_is_said(comm):
    """An error with the remedy, on every rank."""
    config = configuration(micro_batch_size=SEQUENCES, reproducible=False)
    if comm.size == 1:
        parallel(config)
        return
    with pytest.raises(UserError, match="micro_batch_size"):
        parallel(config)


def test_an_unknown_synchronizer_is_named():
    """With those there are."""
    with pytest.raises(UserError, match="allreduce"):
        sync.get("telepathy")


def test_a_bad_gradient_on_one_rank_skips_the_step_on_all(comm):
    """Nothing changes anywhere, it is counted, and the next step is made."""
    config = configuration(reproducible=False)
    with session() as world:
        arithmetic = Arithmetic("fp32", False, 1, 1, False, "", "")
        core = assemble.build(config, world, assemble.shape_of(config, VOCAB), arithmetic)
        assemble.restore(core, assemble.shape_of(config, VOCAB), config, None)
        before = core.parts[-1].norm.weight.detach().clone()
        poison = core.parts[-1].norm.weight.register_hook(lambda g: g * np.nan) if comm.rank == comm.size - 1 else None
        for step, expected in enumerate([(0, 1), (1, 1)]):
            tokens = windows(step).reshape(-1, 1, LENGTH + 1)[list(core.slots)]
            core.pipeline.run(Batch(tokens[..., :-1], tokens[..., 1:], None))
            core.update.begin(step)
            core.sync.step(core.update)
            everywhere(comm, (core.update.applied, core.update.skipped) == expected)
            everywhere(comm, torch.equal(core.parts[-1].norm.weight, before) == (step == 0))
            if poison:
                poison.remove()
        world.comm.Barrier()


@pytest.mark.serial
def test_who_makes_an_update_for_each_worker_counts_steps():
    """`run.max_skipped` is a number of steps, also where each of them is an update of every worker."""
    config = Config(sync=Sync(kind="parameter_server", staleness="inf"), run=Run(max_skipped=4, reproducible=False))
    update = Update(config.optim, steps=9)
    for _ in range(11):
        update.accept(math.nan)
        trainer.heed_skips(config, 1, update, math.nan, workers=3)
    update.accept(math.nan)
    with pytest.raises(UserError, match="12 times in a row"):
        trainer.heed_skips(config, 1, update, math.nan, workers=3)
