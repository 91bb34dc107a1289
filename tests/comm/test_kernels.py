"""Kernels, as far as that goes without a GPU: their text adds in tree order, and compilers take it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from mpilm.comm import order
from mpilm.comm.devices import _kernels
from mpilm.comm.devices._sums import LocalSum, places
from tests.comm import cases

pytestmark = pytest.mark.serial
ARCHITECTURE = "sm_90"
HEAD, COUNT = 3, 1003


def leaves_of(size: int, low: int, high: int) -> list[range]:
    return order.partials(size, low, high)


SOURCES = {
    **{f"{size} parts, {dtype}": (dtype, [range(size)], 0, size, [range(size)])
       for size in (1, 2, 3, 4, 8, 16) for dtype in _kernels.TYPES},
    "two leaves": ("float32", leaves_of(3, 0, 2), 0, 2, [[0], [1]]),
    "a node in the middle": ("float32", leaves_of(8, 2, 5), 2, 3, [[0], [2]]),
}


def source(dtype: str, leaves: Sequence[range], first: int, size: int, outputs: Sequence[Sequence[int]]) -> str:
    return _kernels.sum_parts(dtype, leaves, first=first, size=size, outputs=outputs)


def played(text: str, parts: list[np.ndarray]) -> list[np.ndarray]:
    """What a kernel's scalar lines make of `parts`."""
    scope = {f"p{number}": part for number, part in enumerate(parts)}
    sums = {name: _value(expression, scope)
            for name, expression in re.findall(r"const [a-z ]+ (s\d+) = (.*?);", text)}
    results = [part.copy() for part in parts]
    for part, name in re.findall(r"p(\d+)\[at\] = (s\d+);", text):
        results[int(part)] = sums[name]
    return results


def _value(expression: str, scope: dict[str, np.ndarray]) -> np.ndarray:
    """Of sums of parts, in parentheses."""
    stack: list[list[np.ndarray]] = [[]]
    for token in re.findall(r"[()]|p\d+", expression):
        if token == "(":
            stack.append([])
        elif token == ")":
            left, right = stack.pop()
            stack[-1].append(left + right)
        else:
            stack[-1].append(scope[token])
    (result,), = stack
    return result


@pytest.mark.parametrize("case", SOURCES.values(), ids=SOURCES)
def test_adds_in_the_order_of_a_host(case: tuple) -> None:
    dtype, leaves, first, size, outputs = case
    parts = [cases.values(rank, COUNT, dtype) for rank in range(size)]
    got = played(source(*case), parts)
    host = LocalSum(leaves, first=first, size=size, mine=0)
    wanted = [part.copy() for part in parts]
    host.sum(wanted, slice(0, COUNT), spread=len(leaves) == 1)
    for number in {part for outs in outputs for part in outs}:
        assert (got[number] == wanted[number]).all()
    assert [outs[0] for outs in outputs] == places(leaves, first=first, mine=0)


@pytest.fixture
def compiler() -> Callable[[str], None]:
    """NVRTC, as CuPy brings it, or nvcc."""
    nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
    try:
        from cupy.cuda import nvrtc
    except ImportError:
        nvrtc = None
    if nvrtc is None and nvcc is None:
        pytest.skip("there is neither CuPy nor nvcc")

    def by_nvcc(text: str) -> None:
        Path("kernel.cu").write_text(text)
        done = subprocess.run([nvcc, f"-arch={ARCHITECTURE}", "-cubin", "-o", "kernel.cubin", "kernel.cu"],
                              capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def by_nvrtc(text: str) -> None:
        program = nvrtc.createProgram(text, "kernel.cu", (), ())
        try:
            nvrtc.compileProgram(program, (f"--gpu-architecture={ARCHITECTURE}",))
            assert nvrtc.getCUBIN(program)
        finally:
            nvrtc.destroyProgram(program)

    return by_nvcc if nvrtc is None else by_nvrtc


@pytest.mark.parametrize("name", ["2 parts, float32", "3 parts, float64", "8 parts, int64", "two leaves", "squares"])
def test_compiles(name: str, compiler: Callable[[str], None], tmp_path: Path,
                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    compiler(_kernels.squares() if name == "squares" else source(*SOURCES[name]))
