"""A node whose ranks cannot share memory, or not enough of it: another collective, and the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import everywhere
from tests.training_cases import alone, apart, configuration, divisible, parallel


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize("collective", ["auto", "shared"])
def test_without_shared_memory_the_bits_are_the_same(comm, monkeypatch, capfd, collective):
    """Said, and done in another way."""
    monkeypatch.setenv("MPILM_SHARED_MEMORY", "/dev/null/nowhere")
    losses, norms, parameters = parallel(configuration(collective))
    said = capfd.readouterr().err
    assert comm.rank > 0 or "can share 0 MiB" in said, said
    expected = alone(configuration(collective))
    assert (losses, norms) == expected[:2]
    for name, values in parameters.items():
        assert torch.equal(values, expected[2][name]), name


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize("collective", ["auto", "shared"])
def test_without_shared_memory_activations_go_by_messages(comm, monkeypatch, capfd, collective):
    """Said, and near one rank."""
    monkeypatch.setenv("MPILM_SHARED_MEMORY", "/dev/null/nowhere")
    losses, norms, _ = parallel(divisible(collective, tp=2))
    said = capfd.readouterr().err
    assert comm.rank > 0 or "can share 0 MiB" in said, said
    expected = alone(divisible())
    everywhere(comm, apart((losses, norms, {}), expected) < 1e-5)
