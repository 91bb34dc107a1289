"""The benchmark of GPUs: it says so where there is none, and its parts run on what a host has."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from mpi4py import MPI

from mpilm.bench import _gpu_links, _gpu_peers, _gpu_steps
from mpilm.comm.transport import ON_HOST, Direct, Staged
from mpilm.launch import session
from mpilm.log import UserError
from tests.comm.late import Late


@pytest.mark.serial
@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="there is a GPU")
def test_without_a_gpu_it_says_so(run_mpi: Any) -> None:
    result = run_mpi(0, ["-m", "mpilm.bench", "gpu"])
    assert (result.rc, "Traceback" in result.stderr) == (2, False), result
    assert "no GPU is to be seen" in result.stderr


def test_links(comm: MPI.Comm) -> None:
    late, told = Late(comm.rank), {}
    _gpu_links.run(comm, lambda case, who, value, unit: told.update({who: value}), [Staged(late), Direct(late)],
                   sizes_mib=[1], rounds=1)
    expected = {"copy", "to host", "from host", "copy of the host", "shared ()", "ring (staged)", "ring (device)"}
    assert expected <= set(told)
    assert all(value > 0 or comm.size == 1 for value in told.values())


NANOGPT = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:
    block_size: int
    vocab_size: int
    n_layer: int
    n_head: int
    n_embd: int
    dropout: float
    bias: bool

class GPT(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        self.words = torch.nn.Embedding(config.vocab_size, config.n_embd)
        print("number of parameters")

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        return torch.optim.AdamW(self.parameters(), lr=learning_rate, betas=betas, weight_decay=weight_decay)

    def forward(self, idx, targets=None):
        logits = self.words(idx) @ self.words.weight.t()
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1))
"""


def steps(nanogpt: str = "") -> dict[str, float]:
    told = {}
    with session() as world:
        _gpu_steps.run(world, lambda case, who, value, unit: told.update({who: value}), ON_HOST, "tiny", rounds=1,
                       steps=1, reproducible=True, fp8=True, graphs=True,
                       peers=_gpu_peers.chosen(llama=True, nanogpt=nanogpt))
    return told


@pytest.mark.slow
@pytest.mark.ranks(min=2)
def test_steps() -> None:
    told = steps()
    assert min(told[who] for who in ("mpilm", "mpilm-reproducible", "mpilm-fp8")) > 0
    assert "llama-compile" not in told, "which is one process"


@pytest.mark.slow
@pytest.mark.serial
def test_steps_beside_peers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One of which has the interface of nanoGPT, and is no more than that."""
    (tmp_path / "model.py").write_text(NANOGPT)
    told = steps(str(tmp_path))
    assert min(told[who] for who in ("mpilm", "mpilm-reproducible", "llama-compile", "nanogpt-compile")) > 0
    assert "number of parameters" not in capsys.readouterr().out, "which may be JSON"


@pytest.mark.serial
def test_a_folder_without_nanogpt(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"there is no model\.py in it"):
        _gpu_peers.chosen(llama=False, nanogpt=str(tmp_path))
