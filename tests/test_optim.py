"""The update against torch's own optimizer, and the schedules against their formulas."""

import math

import pytest
import torch

from mpilm import optim
from mpilm.config import Optim
from mpilm.flat import Flat
from mpilm.flat import add as flat_add
from mpilm.optim import Update, learning_rate

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]     # the compiler warns of its own code


def flat(count, *, decay=True, dtype=torch.float32):
    """Random masters and gradients, the same on every rank."""
    draw = torch.Generator().manual_seed(3)
    masters = torch.randn(count, generator=draw)
    weights = masters if dtype == torch.float32 else masters.to(dtype)
    return Flat(masters, weights, (torch.zeros(count),), (torch.zeros(count), torch.zeros(count)), decay)


@pytest.fixture(params=[False, True], ids=["", "compiled"])
def make(request):
    """An update, as it is or compiled."""
    def make(config: Optim, steps: int) -> Update:
        return Update(config, steps, compiled=request.param)
    return make


@pytest.mark.parametrize("decay", [True, False])
def test_five_updates_are_those_of_torch(decay, make):
    """AdamW with clipping, against torch.optim.AdamW and clip_grad_norm_ on the same gradients."""
    config = Optim(lr=1e-2, warmup_steps=2, clip=1.0)
    mine, update = flat(1000, decay=decay), make(config, steps=10)
    twin = torch.nn.Parameter(mine.masters.clone())
    reference = torch.optim.AdamW([twin], betas=(config.beta1, config.beta2), eps=config.eps,
                                  weight_decay=config.weight_decay if decay else 0.0)
    draw = torch.Generator().manual_seed(5)
    for step in range(5):
        gradient = torch.randn(1000, generator=draw)
        mine.gradients[0].copy_(gradient)
        update.begin(step)
        scale = update.accept(float(gradient.norm()))
        update.apply(mine, scale)
        twin.grad = gradient.clone()
        torch.nn.utils.clip_grad_norm_([twin], config.clip)
        reference.param_groups[0]["lr"] = learning_rate(config, step, 10)
        reference.step()
    torch.testing.assert_close(mine.masters, twin.detach(), rtol=1e-6, atol=1e-7)


def test_cuts_do_not_change_bits(monkeypatch):
    """Any cut at a multiple of 16 elements gives the bits of the whole."""
    results = []
    for chunk in (16, 4096, optim.CHUNK):
        monkeypatch.setattr(optim, "CHUNK", chunk)
        mine, update = flat(10_000, dtype=torch.bfloat16), Update(Optim(), steps=10)
        mine.gradients[0].copy_(mine.masters)
        update.begin(3)
        update.apply(mine, update.accept(7.0))
        results.append(mine)
    for other in results[1:]:
        assert torch.equal(results[0].masters, other.masters) and torch.equal(results[0].weights, other.weights)


def test_compiled_any_cut_has_the_bits_of_the_whole_and_gradients_are_added_up():
    """A sum of bf16 gradients is what the same sum is, written down in float32."""
    draw = torch.Generator().manual_seed(7)
    addends = tuple(torch.randn(10_000, generator=draw).bfloat16() for _ in range(3))
    results = []
    for cuts, gradients in (([10_000], (flat_add(addends),)), ([10_000], addends), ([1, 6, 3993, 6000], addends)):
        mine, update = flat(10_000, dtype=torch.bfloat16), Update(Optim(), 10, compiled=True)
        update.begin(3)
        scale = update.accept(7.0)
        arrays = mine.masters, mine.weights, *mine.states, *gradients
        for masters, weights, m, v, *part in zip(*(array.split(cuts) for array in arrays), strict=True):
            update.apply(Flat(masters, weights, tuple(part), (m, v), decay=True), scale)
        results.append(mine)
    for other in results[1:]:
        assert torch.equal(results[0].masters, other.masters) and torch.equal(results[0].weights, other.weights)
        assert all(map(torch.equal, results[0].states, other.states))


def test_weights_are_rounded_masters(make):
    """What the model computes with follows the masters at once."""
    mine, update = flat(100, dtype=torch.bfloat16), make(Optim(), steps=10)
    mine.gradients[0].fill_(0.1)
    update.begin(0)
    update.apply(mine, update.accept(1.0))
    assert torch.equal(mine.weights, mine.masters.to(torch.bfloat16))


@pytest.mark.parametrize("norm", [math.nan, math.inf])
def test_a_bad_norm_is_not_accepted(norm):
    """Skipped, counted, and forgotten in a row once a good one comes."""
    update = Update(Optim(), steps=10)
    assert update.accept(norm) is None and update.accept(norm) is None
    assert (update.applied, update.skipped, update.skipped_in_a_row) == (0, 2, 2)
    assert update.accept(0.5) == 1.0
    assert (update.applied, update.skipped, update.skipped_in_a_row) == (1, 2, 0)


def test_clipping_can_be_off():
    """`clip` 0 leaves any finite gradient as it is."""
    assert Update(Optim(clip=0.0), steps=1).accept(1e6) == 1.0


def test_cosine():
    """Linear up, half a cosine down to min_lr."""
    config = Optim(lr=1.0, warmup_steps=10, min_lr=0.1)
    assert [learning_rate(config, step, 110) for step in (0, 9)] == [0.1, 1.0]
    assert learning_rate(config, 60, 110) == pytest.approx(0.55)
    assert learning_rate(config, 110, 110) == pytest.approx(0.1)


def test_warmup_stable_decay():
    """Flat until the last part of the steps, then a line."""
    config = Optim(lr=1.0, schedule="wsd", warmup_steps=10, decay_fraction=0.2, min_lr=0.0)
    assert [learning_rate(config, step, 100) for step in (10, 50, 80)] == [1.0, 1.0, 1.0]
    assert learning_rate(config, 90, 100) == pytest.approx(0.5)
    assert learning_rate(config, 100, 100) == 0.0


def test_a_warmup_that_reaches_into_the_decay():
    """The decay then begins at its end: no learning rate is more than what was warmed up to, and none falls at once."""
    config = Optim(lr=1.0, schedule="wsd", warmup_steps=8, decay_fraction=0.5, min_lr=0.0)
    rates = [learning_rate(config, step, 10) for step in range(11)]
    assert rates[:8] == [pytest.approx((step + 1) / 8) for step in range(8)]
    assert rates[8:] == [1.0, 0.5, 0.0]
