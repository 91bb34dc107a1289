"""The data benchmark: everyone hands out the same thing, and there are figures for all."""

from contextlib import ExitStack

import numpy as np
import pytest

from mpilm.bench import data


def test_contenders_read_the_same_tokens(tmp_path):
    data.prepare(tmp_path, 50_000)
    tokens = np.fromfile(tmp_path / "tokens.bin", np.uint16)
    with ExitStack() as stack:
        batches = [read() for read in data.contenders(tmp_path, 4, stack).values()]
    for inputs, targets in batches:
        assert inputs.shape == targets.shape == (4, data.LENGTH)
        assert inputs.dtype == targets.dtype == np.int64
        assert np.array_equal(inputs[:, 1:], targets[:, :-1])
        windows = np.lib.stride_tricks.sliding_window_view(tokens, data.LENGTH)
        for row in inputs:
            assert (windows[:, :8] == row[:8]).all(axis=1).any()


@pytest.mark.slow
def test_figures_for_all(comm, monkeypatch):
    monkeypatch.setattr(data, "NUM_TOKENS", 1 << 16)
    monkeypatch.setattr(data, "WINDOWS", 64)
    figures = []
    data.run(comm, lambda *figure: figures.append(figure))
    assert {(case, who) for case, who, _, _ in figures} == {
        (f"{batch} windows", who) for batch in (16, 64) for who in ("mpilm", "mpilm-loader", "memmap", "h5py")}
    assert all(value > 0 and unit == "windows/s" for _, _, value, unit in figures)
