"""Layers of one's own in pipeline x data parallel: the bits of one rank, and the formulas they stand for."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from mpilm import hybrid
from mpilm.log import UserError
from mpilm.parallel import schedules
from tests.helpers import everywhere
from tests.hybrid_cases import alone, configuration, course, everyone, examples, images, perceptron, same

every_schedule = pytest.mark.parametrize("name", sorted(schedules.MENU))


def layouts(comm):
    """Every pp that divides the number of ranks."""
    return [pp for pp in range(1, comm.size + 1) if comm.size % pp == 0]


@cache
def of_one_rank(layers):
    """Which knows no schedule."""
    with alone(layers(), configuration()) as model:
        return course(model)


@pytest.mark.turns(at=(1, 3))
@every_schedule
@pytest.mark.parametrize("layers", [perceptron, images])
def test_any_layout_has_the_bits_of_one_rank(name, layers, comm):
    """Losses, norms, weights, predictions; dropout too, also where all stages compute again."""
    expected = of_one_rank(layers)
    for pp in layouts(comm):
        for recompute in (False, True)[:2 if pp == comm.size else 1]:
            options = {"pp": pp, "schedule": name, "chunks": 8 // pp, "recompute": recompute}
            with everyone(layers(), configuration(**options)) as model:
                everywhere(comm, same(expected, course(model)), str(options))


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"collective": "tree"}, {"split": "hand"}])
def test_other_options_have_the_bits_of_one_rank_too(options, comm):
    """In bf16, by another collective, dealt by hand so that a stage may have no weights."""
    if "split" in options:
        options = {"split": ",".join(["1"] * (comm.size - 1) + [str(10 - comm.size)])}
    single = {key: value for key, value in options.items() if key == "precision"}
    with alone(perceptron(), configuration(**single)) as model:
        expected = course(model)
    with everyone(perceptron(), configuration(pp=comm.size, **options)) as model:
        everywhere(comm, same(expected, course(model)), str(options))


def test_a_step_without_a_finite_gradient_is_skipped_and_told(comm, capsys):
    """Until there are too many in a row; weights stay as they were."""
    inputs, labels = examples()
    inputs[:] = np.nan
    config = configuration(pp=comm.size)
    config.run.max_skipped = 2
    with hybrid.model(perceptron(), nn.functional.cross_entropy, inputs, labels, config) as model:
        before = model.state_dict()
        model.step()
        told = capsys.readouterr().out
        everywhere(comm, comm.rank > 0 or "step 1: the gradient norm is nan; step skipped (1 in a row" in told, told)
        with pytest.raises(UserError, match="NaN or infinite 2 times in a row"):
            model.step()
        after = model.state_dict()
        everywhere(comm, all(torch.equal(value, after[name]) for name, value in before.items()))


def plain(inputs, labels):
    """Gradients of the mean loss of these examples by PyTorch alone: name -> array."""
    model = smooth()
    nn.functional.cross_entropy(model(torch.from_numpy(inputs).float()), torch.from_numpy(labels)).backward()
    return {name: parameter.grad.double().numpy() for name, parameter in model.named_parameters()}


def smooth():
    """Without chance."""
    torch.manual_seed(8)
    return nn.Sequential(nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 8), nn.GELU(), nn.Linear(8, 4))


def gradients(**options):
    """(what one step of plain SGD with rate 1 took away, ids of its examples by replica, stages, replica)."""
    layers = smooth()
    before = {name: value.clone() for name, value in layers.state_dict().items()}
    with everyone(layers, configuration(lr=1.0, clip=0.0, decay=0.0, **options), optimizer="sgd") as model:
        slots = model.sampler.ids(0).reshape(-1, model.size)
        replicas = np.split(slots, np.cumsum(model.losses.counts)[:-1])
        model.step()
        after = model.state_dict()
        return {name: (before[name] - after[name]).double().numpy() for name in before}, replicas


def close(found, expected):
    """Up to float32's rounding of weights near 1."""
    return all(np.allclose(found[name], expected[name], rtol=1e-4, atol=3e-7) for name in expected)


def weighted(parts):
    """Sum over (weight, gradients)."""
    return {name: sum(weight * part[name] for weight, part in parts) for name in parts[0][1]}


def test_the_gradient_of_replicas_is_their_mean(comm):
    """G = 1/R sum over replicas r of G_r, where G_r is the gradient of the mean loss of r's examples.

    With three ranks the shares differ, and so does their weight."""
    inputs, labels = examples()
    found, replicas = gradients(pp=1)
    of_replicas = [plain(inputs[ids.reshape(-1)], labels[ids.reshape(-1)]) for ids in replicas]
    shares = [ids.size / 16 for ids in replicas]
    everywhere(comm, close(found, weighted(list(zip(shares, of_replicas, strict=True)))))
    assert len(replicas) == comm.size and (comm.size == 3 or set(shares) == {1 / comm.size})


@every_schedule
def test_the_gradient_of_a_part_of_the_model_is_the_sum_of_what_is_contributed_to_it(name, comm):
    """G_k = sum over micro-batches of what each adds to the weights of part k, in all that they pass through."""
    inputs, labels = examples()
    found, (slots,) = gradients(pp=comm.size, schedule=name, chunks=1)
    contributed = [(1 / len(slots), plain(inputs[ids], labels[ids])) for ids in slots]
    everywhere(comm, close(found, weighted(contributed)))


@pytest.mark.ranks(min=4, max=4)
@every_schedule
def test_the_gradient_of_the_hybrid_is_both(name, comm):
    """The mean over replicas of the sums that each replica's pipeline makes."""
    inputs, labels = examples()
    found, replicas = gradients(pp=2, schedule=name, chunks=2)
    of_replicas = [weighted([(1 / len(slots), plain(inputs[ids], labels[ids])) for ids in slots]) for slots in replicas]
    everywhere(comm, len(replicas) == 2 and close(found, weighted([(0.5, part) for part in of_replicas])))


def test_layers_take_back_what_was_trained_and_predict_the_same(comm):
    """On every rank; ids of an epoch are each example once."""
    layers = perceptron()
    with everyone(layers, configuration(pp=comm.size)) as model:
        first = model.epoch()
        assert model.steps_done == 2 and np.isfinite(first)
        model.epoch()
        assert model.steps_done == 3
        state, found = model.state_dict(), model.predict(examples(5)[0])
    other = perceptron()
    other.load_state_dict(state)
    expected = other.eval()(torch.from_numpy(examples(5)[0]).float()).detach().numpy()
    everywhere(comm, found.shape == (5, 4) and np.allclose(found, expected, rtol=1e-5, atol=1e-6))


def test_a_loss_that_is_a_module_and_layers_that_are_frozen(comm):
    """Only the others are trained; the first values are those of rank 0."""
    layers = smooth()
    layers[2].requires_grad_(False)
    torch.manual_seed(comm.rank)
    nn.init.normal_(layers[4].weight)
    before = comm.bcast({name: value.clone() for name, value in layers.state_dict().items()})
    with hybrid.model(layers, nn.CrossEntropyLoss(label_smoothing=0.1), *examples(), configuration(pp=comm.size),
                      optimizer="sgd") as model:
        model.step()
        after = model.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    everywhere(comm, changed == {name for name in before if not name.startswith("2.")}, str(changed))


class Pair(nn.Module):
    """What no layer may do."""

    def forward(self, x):
        """Two tensors."""
        return x, x


def twice():
    """The first layer comes once more at the end."""
    torch.manual_seed(9)
    shared = nn.Linear(12, 12)
    return [shared, nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), shared]


@pytest.mark.parametrize(("layers", "options", "said"), [
    (lambda: [nn.Linear(12, 4), nn.BatchNorm1d(4)], {}, r"Layer 1 \(BatchNorm1d\) changes its buffer running_mean"),
    (lambda: [nn.Linear(12, 4), Pair()], {}, "makes a tuple"),
    (lambda: [nn.Linear(11, 4)], {}, r"Layer 0 \(Linear\) fails on a micro-batch of shape \(2, 12\)"),
    (list, {}, "There are no layers"),
    (perceptron, {"pp": 7}, r"--parallel.pp 7: . ranks? can't be divided .* may be 1"),
    (perceptron, {"pp": 1, "schedule": "interleaved", "chunks": 10}, "10 stages are wanted, and there are 9 layers"),
    (perceptron, {"tp": 2}, "--parallel.tp 2"),
    (perceptron, {"split": "4,4"}, "give how many of the 9 layers each of the 1 stages gets, such as 9"),
    (perceptron, {"schedule": "1f2b"}, "gpipe, 1f1b"),
    (perceptron, {"slots": 0}, "batch"),
])
def test_what_cannot_be_trained_is_told(layers, options, said, comm):
    """On every rank alike, before anything is sent."""
    config = configuration(slots=1) if "slots" in options else configuration(**options)
    if "slots" in options:
        config.data.micro_batch_size = 3
    with pytest.raises(UserError, match=said), everyone(layers(), config):
        pass


@pytest.mark.ranks(min=2)
def test_what_ranks_do_not_agree_on_is_told(comm):
    """Another width on one rank; a parameter on two stages."""
    width = 5 if comm.rank == comm.size - 1 else 6
    said = rf"(?s)rank {comm.size - 1}: layers, arrays or options are not .*tensors.0.weight: expected"
    with pytest.raises(UserError, match=said), \
         everyone([nn.Linear(12, width), nn.Linear(width, 4)], configuration()):
        pass
    with pytest.raises(UserError, match="would share a parameter"), everyone(twice(), configuration(pp=comm.size)):
        pass


def test_a_parameter_that_is_used_twice_on_one_stage_is_trained_by_any_schedule(comm):
    """Where a backward pass can't be split it is done whole, and what would come apart is not computed again."""
    with alone(twice(), configuration()) as model:
        expected = course(model)
    for name in schedules.MENU:
        for recompute in (False, True):
            with everyone(twice(), configuration(schedule=name, chunks=1, recompute=recompute)) as model:
                everywhere(comm, same(expected, course(model)), f"{name} {recompute}")
