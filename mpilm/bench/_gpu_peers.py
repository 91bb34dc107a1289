"""What others make of the same model and batch on one GPU: the peers of `bench gpu`, under torch.compile.

    peers = chosen(llama=True, nanogpt="../nanoGPT")        # name -> how to make its net
    step = training(peers["llama-compile"], case, micro_batches=2, device="cuda:0")

Mixed precision, AdamW and clipping as PyTorch's documentation has them. To add one, write a function that makes its
`Net`, and give it a name in `chosen`.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpilm.bench._contenders import Case, _llama
from mpilm.log import UserError

ANOTHER_MODEL = ("nanogpt-compile",)   # whose tokens take other FLOPs than ours
BETAS, WEIGHT_DECAY = (0.9, 0.95), 0.1


@dataclass(frozen=True)
class Net:
    """What is trained.

    Attributes:
        module: On its device, float32.
        optimizer: Of its parameters.
        loss: Of the module, compiled, on [sequences, length + 1] tokens: the mean over them.
    """

    module: torch.nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any, Tensor], Tensor]


Peer = Callable[[Case, str], Net]


def chosen(*, llama: bool, nanogpt: str = "") -> dict[str, Peer]:
    """Those who take part.

    Args:
        llama: transformers' Llama, which is the model that we train.
        nanogpt: A checkout of nanoGPT, whose model has as many layers of the same width, and nearly as many parameters.

    Raises:
        UserError: There is no nanoGPT there.
    """
    peers: dict[str, Peer] = {"llama-compile": _llama_net} if llama else {}
    if nanogpt:
        if not (Path(nanogpt) / "model.py").exists():
            raise UserError(f"--nanogpt {nanogpt}: there is no model.py in it. Give the folder of a checkout: "
                            "git clone https://github.com/karpathy/nanoGPT")
        peers["nanogpt-compile"] = partial(_nanogpt_net, Path(nanogpt))
    return peers


def training(peer: Peer, case: Case, *, micro_batches: int, device: str) -> Callable[[], float]:
    """One step of the whole batch, which returns its loss. On "cpu" nothing is compiled."""
    net, on_gpu = peer(case, device), device != "cpu"
    run = torch.compile(net.module) if on_gpu else net.module
    parameters, draw = list(net.module.parameters()), np.random.default_rng(0)
    shape = case.global_batch_size // micro_batches, case.sequence_length + 1

    def step() -> float:
        if on_gpu:
            torch.use_deterministic_algorithms(False)
        net.optimizer.zero_grad(set_to_none=True)
        losses = []
        for _ in range(micro_batches):
            tokens = torch.from_numpy(draw.integers(case.vocab_size, size=shape)).to(device, non_blocking=True)
            with torch.autocast(torch.device(device).type, torch.bfloat16):
                loss = net.loss(run, tokens) / micro_batches
            loss.backward()
            losses.append(loss.detach())
        torch.nn.utils.clip_grad_norm_(parameters, _llama.CLIP)
        net.optimizer.step()
        return float(torch.stack(losses).sum())
    return step


def _llama_net(case: Case, device: str) -> Net:
    def loss(run: Any, tokens: Tensor) -> Tensor:
        found: Tensor = run(input_ids=tokens[:, :-1], labels=tokens[:, :-1],
                            shift_labels=tokens[:, 1:].contiguous()).loss
        return found

    warnings.filterwarnings("ignore", module="transformers")
    module = _llama.model(case).to(device)
    return Net(module, torch.optim.AdamW(module.parameters(), lr=_llama.LEARNING_RATE, fused=True), loss)


def _nanogpt_net(folder: Path, case: Case, device: str) -> Net:
    def loss(run: Any, tokens: Tensor) -> Tensor:
        found: Tensor = run(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())[1]
        return found

    loader = SourceFileLoader("_nanogpt", str(folder / "model.py"))
    theirs: Any = ModuleType(loader.name)
    sys.modules[loader.name] = theirs       # where its dataclass looks for itself
    loader.exec_module(theirs)
    with contextlib.redirect_stdout(sys.stderr):    # it tells of itself
        module = theirs.GPT(theirs.GPTConfig(
            block_size=case.sequence_length, vocab_size=case.vocab_size, n_layer=case.layers, n_head=case.heads,
            n_embd=case.width, dropout=0.0, bias=False)).to(device)
        optimizer = module.configure_optimizers(WEIGHT_DECAY, _llama.LEARNING_RATE, BETAS, torch.device(device).type)
    return Net(module, optimizer, loss)
