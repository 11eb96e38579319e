"""Which kernels run: what is there, why the rest is not, and the caller's choice.

The reference is registered for every device. Importing `spade_kernels._C` registers compiled kernels for CPU tensors,
`spade_kernels._C_cuda` for CUDA tensors; they take precedence there. Triton kernels, and whatever else the table below
or `use_backend` asks for, are put over both.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import numpy
import torch

from spade_kernels import checks, reference

# Who has kernels of an operator for CUDA tensors, the one to take first; who is not here is left to the reference.
# By design, for all dtypes: no device has been measured. Triton's tables of float64 are the reference's.
_ON_CUDA = {
    "window_index": ("cuda",),
    "gather_sum": ("triton",),
    "gather_sum_grad": ("triton",),
    "modulation_table": ("triton",),
    "modulation_table_grad": ("triton",),
    "pack_modulation_weight": ("triton",),
    "channel_stats": ("cuda", "triton"),
    "channel_stats_grad": ("cuda", "triton"),
    "modulate": ("cuda", "triton"),
    "modulate_table_grad": ("cuda", "triton"),
    "modulate_input_grad": ("cuda", "triton"),
}
_TRITON_STEMS = {
    "pack_modulation_weight": "modulation_table",
    "modulate_table_grad": "modulate",
    "modulate_input_grad": "modulate",
}


class MissingKernelsWarning(UserWarning):
    """CPU tensors take plain PyTorch, which is slower, because the compiled kernels cannot run."""


def _load(name: str, build: str) -> tuple[ModuleType | None, str]:
    """A compiled module, or None and why, with the fix: the build that makes it names what it lacks."""
    module = f"spade_kernels.{name}"
    try:
        return importlib.import_module(module), ""
    except ImportError as error:
        state = f"is not built for {sys.implementation.cache_tag}{_why_not_built()}"
        if importlib.util.find_spec(module) is not None:
            state = f"is built but does not load ({error})"
    fix = f"SPADE_KERNELS_BUILD={build} pip install ."
    return None, f"{module} {state}; in the sources of spade-kernels, run {fix}"


def _why_not_built() -> str:
    """The reason that setup.py left, in parentheses."""
    reason = Path(__file__).with_name("not_built.txt")
    return f" ({reason.read_text(encoding='utf-8')})" if reason.is_file() else ""


_cpu, _why_no_cpu = _load("_C", "cpu")
_cuda, _why_no_cuda = _load("_C_cuda", "cuda") if torch.version.cuda else (None, "this PyTorch is built without CUDA")

for _name, _reason in (("cpu", _why_no_cpu), ("cuda", _why_no_cuda)):
    if _reason:
        logging.getLogger("spade_kernels").debug("backend %s cannot run: %s", _name, _reason)

_chosen = "auto"
_has_warned = False
_operators: list[str] = []
_overriding: torch.library.Library | None = None


def register(library: torch.library.Library, operators: Sequence[str]) -> None:
    """Gives every operator its plain PyTorch kernel, for all devices, and whatever there is above it."""
    _operators.extend(operators)
    for name in operators:
        library.impl(name, _python_kernel(name, "reference"), "CompositeExplicitAutograd")
    _override()


def _python_kernel(name: str, backend: str) -> Callable:
    def kernel() -> Callable:
        if backend == "reference":
            return getattr(reference, name)
        stem = _TRITON_STEMS.get(name, name.removesuffix("_grad"))
        return getattr(importlib.import_module(f"spade_kernels.triton.{stem}"), name)

    def run(*args):
        checks.check(name, *args)
        if backend == "reference":
            _warn_if_missing(args[0].device)
        # Autocast would otherwise reach into the kernel and round its float32 products, and Triton launches on the
        # current device.
        with torch.amp.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return kernel()(*args)

    return run


def _warn_if_missing(device: torch.device) -> None:
    """Says once in a process that CPU tensors have no compiled kernels, unless the caller chose to do without."""
    global _has_warned
    worker = torch.utils.data.get_worker_info()
    # One worker of a data loader speaks for all.
    if _has_warned or device.type != "cpu" or _cpu or _chosen == "reference" or (worker and worker.id > 0):
        return
    _has_warned = True
    warnings.warn(f"CPU tensors take plain PyTorch, which is slow: {_why_no_cpu}", MissingKernelsWarning, stacklevel=2)


def _override() -> None:
    """Puts the kernels that calls are to take over those that the compiled modules registered."""
    global _overriding
    if _overriding is not None:
        _overriding._destroy()
    _overriding = torch.library.Library("spade_kernels", "IMPL")
    compiled = {"cpu": "cpu" if _cpu else None, "cuda": "cuda" if _cuda else None}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
        for device, below in compiled.items():
            for name, backend in kernels_on(device).items():
                is_there = below in _candidates(name, device) if backend == "reference" else backend != below
                if is_there:
                    _overriding.impl(name, _python_kernel(name, backend), device.upper(), allow_override=True)


def _candidates(name: str, device: str) -> tuple[str, ...]:
    return {"cpu": ("cpu",), "cuda": _ON_CUDA.get(name, ("reference",))}[device]


def kernels_on(device: str) -> dict[str, str]:
    """By operator, the backend whose kernel a tensor on "cpu" or "cuda" takes."""
    there = {"cpu": _cpu is not None, "cuda": _cuda is not None, "triton": _why_no_triton() is None, "reference": True}
    taken = {}
    for name in _operators:
        candidates = [backend for backend in _candidates(name, device) if there[backend]]
        if _chosen in candidates or _chosen == "reference":
            candidates = [_chosen]
        taken[name] = candidates[0] if candidates else "reference"
    return taken


def is_compiled_on_cpu() -> bool:
    """True if CPU tensors take the compiled kernels. Cheap enough to call in every operator."""
    return _cpu is not None and _chosen != "reference"


def is_captured(t: torch.Tensor) -> bool:
    """True while a CUDA graph is being captured: the tensor has no values yet."""
    return t.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def is_cacheable(t: torch.Tensor) -> bool:
    """True if later calls can use the tensor: not if a CUDA graph or compiled code computes it anew in every run."""
    return not torch.compiler.is_compiling() and not is_captured(t)


def synchronize(t: torch.Tensor) -> None:
    """Waits until the tensor is computed, so that calls on other streams can use it."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()


def can_run_reference() -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def can_run_cpu() -> str | None:
    """None, or why the compiled CPU kernels cannot run."""
    return None if _cpu else _why_no_cpu


def can_run_triton() -> str | None:
    """None, or why the Triton kernels cannot run."""
    return _why_no_triton() or _why_no_device()


def can_run_cuda() -> str | None:
    """None, or why the compiled CUDA kernels cannot run."""
    return _why_no_device() if _cuda else _why_no_cuda


def _why_no_triton() -> str | None:
    if not (torch.version.cuda or torch.version.hip):
        return "this PyTorch is built without CUDA and without ROCm"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def _why_no_device() -> str | None:
    return None if torch.cuda.is_available() else "there is no GPU that PyTorch can use"


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
    _override()


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
        "kernels": kernels_on("cuda" if torch.cuda.is_available() else "cpu"),
        "compiled": {module.__name__: module.build_info() for module in (_cpu, _cuda) if module},
    }
