"""A node whose ranks cannot share memory, or not enough of it: another collective, and the same bits."""

from __future__ import annotations

import pytest
import torch

from tests.training_cases import alone, configuration, parallel


@pytest.mark.ranks(min=2, max=2)
@pytest.mark.parametrize("collective", ["auto", "shared"])
def test_without_shared_memory_the_bits_are_the_same(comm, monkeypatch, capfd, collective):
    """Said, and done in another way."""
    monkeypatch.setenv("MPILM_SHARED_MEMORY", "/nonexistent")
    losses, norms, parameters = parallel(configuration(collective))
    said = capfd.readouterr().err
    assert comm.rank > 0 or "can share 0 MiB" in said, said
    expected = alone(configuration(collective))
    assert (losses, norms) == expected[:2]
    for name, values in parameters.items():
        assert torch.equal(values, expected[2][name]), name
