"""`accelerate`: the SPADE layers of other people's models, made fast in place.

    report = sk.accelerate(model)
    print(report)

A family (`families.py`) says how to recognize a layer and where its parts are. A probe compares results and gradients
before a layer is replaced. To add a family of your own, derive from `Family` and append to `FAMILIES`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from spade_kernels.accelerate.families import FAMILIES
    from spade_kernels.accelerate.layer import Family, Parts, formulas
    from spade_kernels.accelerate.projection import Projection, Unsupported
    from spade_kernels.accelerate.report import Report

__all__ = [
    "FAMILIES",
    "Family",
    "Parts",
    "Projection",
    "Report",
    "Unsupported",
    "accelerate",
    "formulas",
    "restore",
]

_MODULES = {
    "families": ("FAMILIES",),
    "layer": ("Family", "Parts", "formulas"),
    "projection": ("Projection", "Unsupported"),
    "report": ("Report",),
}


def __getattr__(name: str) -> Any:
    # Modules are imported at first use, because `import spade_kernels` imports this package, and few programs use it.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def accelerate(model: nn.Module, *, strict: bool = False, measure: bool = False) -> Report:
    """Replaces the forward of the SPADE layers in a model, in place, by one of the same results that is faster.

    Parameters, buffers, state_dict, hooks and the identity of every module stay. Results and gradients differ by
    rounding. `freeze` makes the layers faster still where weights do not change; `restore` undoes it.

    Args:
        model: any module, on any device, before or after `.to()`, `.half()`, DDP or `torch.compile`.
        strict: raise if a layer that looks like a SPADE layer is left alone; then nothing is replaced.
        measure: time every replaced layer before and after, on the CPU, at 64 x 64.

    Returns:
        A report: `print` it.

    Raises:
        TypeError: not a module.
        ValueError: strict, and a layer was left alone; the message names it and the reason.
    """
    from spade_kernels.accelerate.replace import replace_layers

    return replace_layers(model, strict=strict, measure=measure)


def restore(model: nn.Module) -> nn.Module:
    """Gives all accelerated modules of a model their own forward back. Returns the model."""
    from spade_kernels.accelerate.replace import restore_layers

    return restore_layers(model)
