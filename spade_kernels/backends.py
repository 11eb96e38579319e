"""Backends: the choice of the kernels that run, and the reasons why others cannot run.

The reference kernels, in plain PyTorch, are registered for every device. Importing `spade_kernels._C` registers
compiled kernels for CPU tensors, and importing `spade_kernels._C_cuda` registers those for CUDA tensors; on their
device, both take precedence over the reference. Where an operator's file prefers another backend, or `use_backend` asks
for one, that backend's kernel overrides the registered one. Triton kernels are always registered this way.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import logging
import platform
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy
import torch

from spade_kernels import reference
from spade_kernels._sources import fingerprint
from spade_kernels._version import __version__

# The backends other than the reference that have kernels for tensors on a device.
_ON_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}


class _Operator(NamedTuple):
    """An operator: the stem of its files, the backends with kernels for it (preferred first), its argument check."""

    stem: str
    backends: Sequence[str]
    check: Callable[..., None]


class MissingKernelsWarning(UserWarning):
    """Operators on CPU tensors run in plain PyTorch, which is slower, because the compiled kernels cannot run."""


def _load(name: str, build: str) -> tuple[ModuleType | None, str]:
    """Imports a compiled module.

    Returns the module and "", or None and a message with the reason and the command that builds the module. If that
    build fails, it names what is missing.
    """
    module = f"spade_kernels.{name}"
    try:
        compiled = importlib.import_module(module)
        sources = fingerprint(Path(__file__).parents[1])
        if sources is None or compiled.build_info().get("sources") == sources:
            return compiled, ""
        state = "was built from other sources than those of this checkout"
    except ImportError as error:
        state = f"is not built for {sys.implementation.cache_tag}{_why_not_built()}"
        if importlib.util.find_spec(module) is not None:
            state = f"is built but does not load ({error})"
    fix = f"SPADE_KERNELS_BUILD={build} pip install ."
    return None, f"{module} {state}; in the sources of spade-kernels, run {fix}"


def _why_not_built() -> str:
    """The reason, recorded by setup.py, why the module was not built: in parentheses, or empty if there is none."""
    reason = Path(__file__).with_name("not_built.txt")
    return f" ({reason.read_text(encoding='utf-8')})" if reason.is_file() else ""


_cpu, _why_no_cpu = _load("_C", "cpu")
_cuda, _why_no_cuda = _load("_C_cuda", "cuda") if torch.version.cuda else (None, "this PyTorch is built without CUDA")

for _name, _reason in (("cpu", _why_no_cpu), ("cuda", _why_no_cuda)):
    if _reason:
        logging.getLogger("spade_kernels").debug("backend %s cannot run: %s", _name, _reason)

_chosen = "auto"
_has_warned = False
_operators: dict[str, _Operator] = {}
_overriding: torch.library.Library | None = None


def register(
    library: torch.library.Library, name: str, stem: str, backends: Sequence[str], check: Callable[..., None]
) -> None:
    """Registers an operator's plain PyTorch kernel for all devices, and overrides it where another is preferred.

    Args:
        stem: name of the module in triton/ that has the operator's Triton kernel.
        backends: the backends that have a kernel for the operator, the preferred one first. On GPUs the order was
            chosen by design: no kernel has been measured there. Compiled modules register their own kernels when they
            are imported.
        check: raises if the operator's arguments do not fit.
    """
    _operators[name] = _Operator(stem, backends, check)
    library.impl(name, _python_kernel(name, "reference"), "CompositeExplicitAutograd")
    _override(name)


def _python_kernel(name: str, backend: str) -> Callable:
    stem, _, check = _operators[name]

    def kernel() -> Callable:
        if backend == "reference":
            return getattr(reference, name)
        return getattr(importlib.import_module(f"spade_kernels.triton.{stem}"), name)

    def run(*args):
        check(*args)
        if backend == "reference":
            _warn_if_missing(args[0].device)
        # Autocast is off, because it would round the factors of the kernel's float32 products. The device of the tensor
        # is made current, because Triton launches on the current device.
        with torch.amp.autocast(args[0].device.type, enabled=False), torch.cuda.device_of(args[0]):
            return kernel()(*args)

    return run


def _warn_if_missing(device: torch.device) -> None:
    """Warns once per process that CPU tensors have no compiled kernels, unless the caller chose the reference."""
    global _has_warned
    worker = torch.utils.data.get_worker_info()
    # Only the first worker of a data loader warns.
    if _has_warned or device.type != "cpu" or _cpu or _chosen == "reference" or (worker and worker.id > 0):
        return
    _has_warned = True
    warnings.warn(f"CPU tensors take plain PyTorch, which is slow: {_why_no_cpu}", MissingKernelsWarning, stacklevel=2)


def _override(*names: str) -> None:
    """Overrides the registered kernels of operators where calls shall run the kernel of another backend."""
    global _overriding
    if _overriding is None:
        _overriding = torch.library.Library("spade_kernels", "IMPL")
    # A compiled module registers its kernels even if `_load` then rejects it.
    registered = {"cpu": "spade_kernels._C" in sys.modules, "cuda": "spade_kernels._C_cuda" in sys.modules}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
        for device, name in itertools.product(registered, names):
            taken, is_compiled = _kernel_on(device, name), registered[device] and device in _operators[name].backends
            # Without an override the compiled kernel runs or, where there is none, the reference.
            if taken != (device if is_compiled else "reference"):
                _overriding.impl(name, _python_kernel(name, taken), device.upper(), allow_override=True)


def _remove_overrides() -> None:
    global _overriding
    if _overriding is not None:
        _overriding._destroy()
    _overriding = None


def operators_of(backend: str) -> list[str]:
    """The names of the operators for which a backend has kernels."""
    return [name for name, operator in _operators.items() if backend in operator.backends]


def kernels_on(device: str) -> dict[str, str]:
    """A dict from each operator's name to the backend whose kernel runs on `device`, "cpu" or "cuda"."""
    return {name: _kernel_on(device, name) for name in _operators}


def _kernel_on(device: str, name: str) -> str:
    candidates = [b for b in _operators[name].backends if b in _ON_DEVICE[device] and _is_there(b)]
    if _chosen == "reference" or not candidates:
        return "reference"
    return _chosen if _chosen in candidates else candidates[0]


def _is_there(backend: str) -> bool:
    if backend == "triton":
        return _why_no_triton() is None
    return (_cpu if backend == "cpu" else _cuda) is not None


def is_compiled_on_cpu() -> bool:
    """True if the compiled kernels run for CPU tensors. The check is cheap enough for every call of an operator."""
    return _cpu is not None and _chosen != "reference"


def is_captured(t: torch.Tensor) -> bool:
    """True for a CUDA tensor while a CUDA graph is captured: the tensor has no values until the graph runs."""
    return t.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()


def synchronize(t: torch.Tensor) -> None:
    """Waits until the tensor is computed, so that calls on other streams can use it."""
    if t.is_cuda:
        torch.cuda.current_stream(t.device).synchronize()


def can_run_reference() -> str | None:
    """Always None: plain PyTorch runs everywhere."""
    return None


def can_run_cpu() -> str | None:
    """None if the compiled CPU kernels can run, else the reason why they cannot."""
    return None if _cpu else _why_no_cpu


def can_run_triton() -> str | None:
    """None if the Triton kernels can run, else the reason why they cannot."""
    return _why_no_triton() or _why_no_device()


def can_run_cuda() -> str | None:
    """None if the compiled CUDA kernels can run, else the reason why they cannot."""
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
        name: "reference", "cpu", "triton" or "cuda"; or "auto" for each operator's preferred backend that can run.

    Raises:
        ValueError: `name` is not a backend.
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
    _remove_overrides()
    _override(*_operators)


def current_backend() -> str:
    """The chosen backend; under "auto", the first of "cuda", "triton", "cpu" and "reference" that can run."""
    if _chosen != "auto":
        return _chosen
    return next(name for name, probe in _PROBES.items() if probe() is None)


def build_info() -> dict[str, object]:
    """A dict of versions and devices, the kernels in use, and for each backend None or the reason it cannot run."""
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
