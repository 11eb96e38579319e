"""The Triton kernels: on a CUDA device, or without one in Triton's interpreter, on CPU tensors.

In the interpreter every access is checked to be one of a tensor's (`interpreter`); on a device, that margins round
outputs and scratch come out untouched.
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest
import torch

_MARGIN = 64  # elements: a multiple of 16 bytes, so that addresses stay aligned


def _why_not() -> str | None:
    # Not "triton" alone: a folder of that name on the path would do.
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("triton.language") is None:
        return "Triton is not installed"
    if os.environ.get("TRITON_INTERPRET") != "1" and not torch.cuda.is_available():
        return "no CUDA device is here; TRITON_INTERPRET=1, set before Python starts, runs the kernels on the CPU"
    return None


class _SkippedModule(pytest.Module):
    def collect(self):
        pytest.skip(f"{_why_not()}", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent):
    """The modules import the kernels: where these cannot run, they are not even imported."""
    return None if _why_not() is None else _SkippedModule.from_parent(parent, path=module_path)


if _why_not() is None and os.environ.get("TRITON_INTERPRET") == "1":
    from interpreter import make_strict

    make_strict()


@pytest.fixture(scope="session")
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def _poisoned(monkeypatch):
    """Everything `torch.empty` gives is NaN between margins of NaN, and the margins stay so."""
    buffers: list[tuple[torch.Tensor, int]] = []

    def empty(size, *, dtype: torch.dtype, device):
        elements = torch.Size(size).numel()
        buffer = torch.full((elements + 2 * _MARGIN,), float("nan"), dtype=dtype, device=device)
        buffers.append((buffer, elements))
        return buffer[_MARGIN : _MARGIN + elements].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", empty)
        yield
    assert buffers, "nothing was allocated: the test shows nothing"
    for buffer, elements in buffers:
        assert buffer[:_MARGIN].isnan().all(), "written before an output"
        assert buffer[_MARGIN + elements :].isnan().all(), "written after an output"
