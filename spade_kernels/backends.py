"""Which kernels run: what is there, why the rest is not, and the caller's choice.

The reference is registered for every device. Importing `spade_kernels._C` registers the compiled kernels for CPU
tensors, which take precedence there.
"""

from __future__ import annotations

import functools
import importlib
import platform
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy
import torch

from spade_kernels import reference

_compiled: Any = None
_why_no_cpu: str | None = None
try:
    _compiled = importlib.import_module("spade_kernels._C")
except ImportError as error:
    _why_no_cpu = f"the compiled module is not there ({error}); install with a C++ compiler and --no-build-isolation"

_chosen = "auto"
_operators: list[str] = []
_reference_on_cpu: torch.library.Library | None = None


def register_reference(library: torch.library.Library, operators: Sequence[str]) -> None:
    """Gives every operator its plain PyTorch kernel, for all devices."""
    _operators.extend(operators)
    for name in operators:
        library.impl(name, _reference_kernel(name), "CompositeExplicitAutograd")


def _reference_kernel(name: str) -> Callable:
    kernel = getattr(reference, name)

    @functools.wraps(kernel)
    def run(*args):
        # Autocast would otherwise reach into the kernel and round its float32 products.
        with torch.amp.autocast(args[0].device.type, enabled=False):
            return kernel(*args)

    return run


def _prefer_reference(wanted: bool) -> None:
    """Puts the reference over the compiled CPU kernels, or takes it away again."""
    global _reference_on_cpu
    if wanted and _reference_on_cpu is None and _why_no_cpu is None:
        _reference_on_cpu = torch.library.Library("spade_kernels", "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
            for name in _operators:
                _reference_on_cpu.impl(name, _reference_kernel(name), "CPU", allow_override=True)
    elif not wanted and _reference_on_cpu is not None:
        _reference_on_cpu._destroy()
        _reference_on_cpu = None


def can_run_reference() -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def can_run_cpu() -> str | None:
    """None, or why the compiled CPU kernels cannot run."""
    return _why_no_cpu


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
    _prefer_reference(name == "reference")


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
        "compiled": None if _compiled is None else _compiled.build_info(),
    }
