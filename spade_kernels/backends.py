"""Which kernels run: what is there, why the rest is not, and the caller's choice."""

from __future__ import annotations

import platform
from collections.abc import Callable

import numpy
import torch

_chosen = "auto"


def can_run_reference() -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def can_run_cpu() -> str | None:
    """None, or why the compiled CPU kernels cannot run."""
    return "this version has no compiled CPU kernels yet"


def can_run_triton() -> str | None:
    """None, or why the Triton kernels cannot run."""
    return "this version has no Triton kernels yet"


def can_run_cuda() -> str | None:
    """None, or why the compiled CUDA kernels cannot run."""
    return "this version has no CUDA kernels yet"


_PROBES: dict[str, Callable[[], str | None]] = {
    "cuda": can_run_cuda,
    "triton": can_run_triton,
    "cpu": can_run_cpu,
    "reference": can_run_reference,
}


def use_backend(name: str) -> None:
    """Chooses the kernels for every later call.

    Args:
        name: "reference", "cpu", "triton", "cuda", or "auto": the first that can run.

    Raises:
        ValueError: not a backend.
        RuntimeError: the backend cannot run here; the message is the reason.
    """
    global _chosen
    if name != "auto":
        if name not in _PROBES:
            raise ValueError(f"unknown backend {name!r}; choose one of auto, {', '.join(_PROBES)}")
        reason = _PROBES[name]()
        if reason is not None:
            raise RuntimeError(f"backend {name!r} cannot run: {reason}")
    _chosen = name


def current_backend() -> str:
    """The backend that calls take now."""
    if _chosen != "auto":
        return _chosen
    return next(name for name, probe in _PROBES.items() if probe() is None)


def build_info() -> dict[str, object]:
    """Versions, devices, and for each backend None or the reason it cannot run."""
    from spade_kernels import __version__

    return {
        "spade_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "backend": current_backend(),
        "backends": {name: probe() for name, probe in _PROBES.items()},
    }
