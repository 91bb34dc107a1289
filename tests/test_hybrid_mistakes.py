"""Layers, losses and arrays of one's own that would train wrongly, or wait for ever: what is said of them."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mpilm import hybrid
from mpilm.log import UserError
from mpilm.parallel import given
from tests.helpers import REPOSITORY, everywhere
from tests.hybrid_cases import alone, configuration, course, everyone, examples, perceptron, same

one_rank = pytest.mark.ranks(max=1)
entropy = nn.functional.cross_entropy


class Scored(nn.Module):
    """A loss with a weight of its own."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, output, target):
        """Weighted."""
        return self.weight * entropy(output, target)


@one_rank
@pytest.mark.parametrize(("loss", "said"), [
    (nn.CrossEntropyLoss(reduction="none"), r"tensor of shape \(2,\): it must be a scalar"),
    (lambda output, target: entropy(output, target).item(), "The loss is a float: it must be a tensor"),
    (lambda output, target: None, "The loss is a NoneType"),
    (lambda output, target: entropy(output, target).detach(), "The loss has no gradient"),
    (lambda output, target: (output.argmax(1) == target).float().mean(), "The loss has no gradient"),
    (nn.MSELoss(), r"The loss fails on outputs \(2, 4\) and targets \(2,\) of torch.int64"),
    (Scored(), "The loss has parameters, which nobody would train"),
])
def test_a_loss_by_which_nothing_is_learned(loss, said):
    """Before the first step."""
    with pytest.raises(UserError, match=said), hybrid.model(perceptron(), loss, *examples(), configuration()):
        pass


def frozen():
    """Nothing is left to train."""
    layers = perceptron()
    layers.requires_grad_(False)
    return layers


class Noted(nn.Linear):
    """It saves what is no tensor."""

    def get_extra_state(self):
        """Something."""
        return {"seen": 1}

    def set_extra_state(self, state):
        """Nothing."""


@one_rank
@pytest.mark.parametrize(("layers", "said"), [
    (frozen, "No layer has a parameter that is trained"),
    (lambda: [nn.Tanh()], "No layer has a parameter that is trained"),
    (lambda: [nn.Tanh(), nn.LazyLinear(4)], r"Layer 1 \(LazyLinear\) is lazy: call it once"),
    (lambda: [nn.Linear(12, 4, dtype=torch.complex64)], r"Layer 0 \(Linear\) has complex numbers"),
    (lambda: [Noted(12, 4)], r"Layer 0 \(Noted\) has extra state"),
])
def test_layers_that_cannot_be_trained(layers, said):
    with pytest.raises(UserError, match=said), everyone(layers(), configuration()):
        pass


@one_rank
@pytest.mark.parametrize(("inputs", "said"), [
    (np.float32(1), r"inputs: float32 of shape \(\)"), ([[1.0], [1.0, 2.0]], "inputs: "),
    (np.array([{}, {}]), "inputs: object of shape"), (["a", "b"], "inputs: <U1"),
    (3j * np.ones(3), "inputs: complex128"),
])
def test_arrays_that_are_no_numbers(inputs, said):
    with pytest.raises(UserError, match=said):
        given.array("inputs", inputs)


@one_rank
@pytest.mark.parametrize("made", [
    lambda x: x, lambda x: torch.from_numpy(x).requires_grad_(), lambda x: x.astype(">f8"), lambda x: x.tolist(),
    lambda x: torch.from_numpy(x).to(torch.bfloat16), np.asfortranarray])
def test_arrays_of_any_make(made):
    x = np.arange(12.0).reshape(3, 4)
    found = given.array("inputs", made(x))
    assert np.array_equal(found, x) and torch.equal(torch.from_numpy(found).double(), torch.from_numpy(x))


@one_rank
def test_predictions_of_another_shape():
    """Of what is given, or of what is made."""
    with everyone(perceptron(), configuration()) as model, \
         pytest.raises(UserError, match=r"inputs: examples of shape \(11,\); the model was made for \(12,\)"):
        model.predict(np.ones((3, 11)))
    with everyone([nn.Linear(12, 4), InTraining()], configuration()) as model, \
         pytest.raises(UserError, match=r"makes \(2, 1\) of a micro-batch in evaluation mode, and made \(2, 4\)"):
        model.predict(examples(3)[0])


class InTraining(nn.Module):
    """Another shape in evaluation."""

    def forward(self, x):
        """All, or the first."""
        return x if self.training else x[:, :1]


class Again(nn.Module):
    """One weight in two backward passes of their own."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(12, 12)

    def forward(self, x):
        """Twice."""
        return checkpoint(self.inner, checkpoint(self.inner, x, use_reentrant=True).tanh(), use_reentrant=True)


@one_rank
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_gradients_that_come_apart():
    """Not half of them."""
    with everyone([nn.Linear(12, 12), Again(), nn.Linear(12, 4)], configuration()) as model, \
         pytest.raises(UserError, match=r"gradient of 1\.inner\.\w+ comes in several parts.*use_reentrant=False"):
        model.step()


@one_rank
def test_hooks_and_weights_that_are_made_of_others(recwarn):
    """A backward pass in two halves would call the former twice; the latter it leaves alone."""
    def layers():
        torch.manual_seed(3)
        return [nn.Linear(12, 9), nn.Tanh(), nn.utils.weight_norm(nn.Linear(9, 4))]

    hooked = layers()
    hooked[0].weight.register_hook(lambda gradient: gradient / 10)
    with pytest.raises(UserError, match=r"0\.weight has a hook .*another --parallel.schedule"), \
         everyone(hooked, configuration(schedule="zb")):
        pass
    found = []
    for schedule in ("1f1b", "zb"):
        with everyone(layers(), configuration(schedule=schedule)) as model:
            found.append(course(model))
    assert same(*found)


def noisy(output, target):
    """A loss that draws at random."""
    return entropy(output + 0.1 * torch.randn_like(output), target)


class Shifted(nn.Module):
    """A buffer that is not saved, with other values on every rank."""

    def __init__(self, rank):
        super().__init__()
        self.register_buffer("shift", torch.full((12,), float(rank)), persistent=False)

    def forward(self, x):
        """Shifted."""
        return x + self.shift


def test_chance_in_a_loss_and_dropout_that_begins_later(comm):
    """Have the bits of one rank; so have buffers that are not saved."""
    def late(model):
        first = model.step()
        for chunk in model.chunks:
            for layer in chunk.modules():
                if isinstance(layer, nn.Dropout):
                    layer.p = 0.5
        return first, course(model)

    def layers(rank):
        torch.manual_seed(4)
        return [Shifted(rank), nn.Linear(12, 8), nn.Dropout(0.0), nn.Linear(8, 4)]

    with alone(layers(0), configuration(), loss=noisy) as model:
        expected = late(model)
    with hybrid.model(layers(comm.rank), noisy, *examples(), configuration(pp=comm.size)) as model:
        found = late(model)
    everywhere(comm, expected[0] == found[0] and same(expected[1], found[1]))


@pytest.mark.ranks(min=2)
@pytest.mark.parametrize(("changed", "said"), [
    ("data", r"inputs: expected .*float64"), ("seed", r"config.run.seed: expected 3"),
    ("optimizer", "optimizer: expected 'adamw'"), ("frozen", r"tensors\.0\.weight: expected"),
    ("option", r"layers\.2: expected 'Dropout\(p=0.3")])
def test_what_ranks_do_not_have_alike(comm, changed, said):
    """They would train something of their own each."""
    last = comm.rank == comm.size - 1
    (inputs, labels), layers, config = examples(), perceptron(), configuration()
    if last and changed == "data":
        order = random.Random(1).sample(range(len(inputs)), len(inputs))
        inputs = inputs[order]
    config.run.seed += last and changed == "seed"
    layers[0].requires_grad_(not (last and changed == "frozen"))
    layers[2].p += 0.1 * (last and changed == "option")
    with pytest.raises(UserError, match=f"(?s)rank {comm.size - 1}: layers, arrays or options are not .*{said}"), \
         hybrid.model(layers, entropy, inputs, labels, config,
                      optimizer="sgd" if last and changed == "optimizer" else "adamw"):
        pass


@pytest.mark.ranks(min=2)
def test_predictions_of_other_inputs(comm):
    with everyone(perceptron(), configuration(pp=comm.size)) as model, \
         pytest.raises(UserError, match=rf"rank {comm.size - 1}: predict\(\) got other inputs than on rank 0"):
        model.predict(examples(3 + (comm.rank == comm.size - 1))[0])


@pytest.mark.parametrize("schedule", ["1f1b", "zb"])
def test_layers_are_the_users_again_at_the_end(comm, schedule):
    """With what this rank has trained of them; the model is not there any more."""
    layers = perceptron()
    with everyone(layers, configuration(pp=comm.size, schedule=schedule)) as model:
        model.step()
        state, units = model.state_dict(), model.chunks[0].units
    kept = [name for name in state if int(name.split(".")[0]) in units]
    everywhere(comm, all(torch.equal(state[name], layers.state_dict()[name]) for name in kept), str(kept))
    everywhere(comm, [type(layer) for layer in layers] == [type(layer) for layer in perceptron()])
    layers(torch.ones(2, 12)).sum().backward()
    everywhere(comm, all(parameter.grad is not None for parameter in layers.parameters()))
    for call in (model.step, model.state_dict, lambda: model.predict(examples(3)[0])):
        with pytest.raises(UserError, match=r"after the end of `with hybrid\.model"):
            call()


PROGRAM = """
import sys
import numpy as np
from torch import nn
from mpilm import hybrid
from mpilm.config import Config, Data, Run

config = Config(run=Run(hang_timeout_s=1.5), data=Data(global_batch_size=8, micro_batch_size=2))
x, y = np.ones((32, 5)), np.ones(32, int)
for _ in range(2):
    with hybrid.model([nn.Linear(5, 3)], nn.functional.cross_entropy, x, y, config) as model:
        model.step()
        if sys.argv[1] != "twice" and model.mesh.comm.rank == 0:
            getattr(model, sys.argv[1])(*[x] * (sys.argv[1] == "predict"))
"""


@pytest.mark.serial
@pytest.mark.parametrize("method", ["step", "predict", "state_dict"])
def test_a_method_that_one_rank_calls_alone(run_mpi, method):
    """Ends the job with where everyone is."""
    result = run_mpi(2, ["-c", PROGRAM, method], cwd=REPOSITORY, timeout=60)
    assert result.rc == 77, result
    assert "rank 1: step 0, the end of `with hybrid.model(...)`, for " in result.stderr, result
    assert f"rank 0: step {1 if method == 'step' else 0}, {method}(), for " in result.stderr, result


@pytest.mark.serial
def test_two_sessions_one_after_the_other(run_mpi):
    result = run_mpi(2, ["-c", PROGRAM, "twice"], cwd=REPOSITORY, timeout=60)
    assert result.rc == 2, result
    assert result.stderr.count("error: MPI ended with this program's first session") == 1, result
    assert "Traceback" not in result.stderr
