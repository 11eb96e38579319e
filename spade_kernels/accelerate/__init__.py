"""Accelerates the SPADE layers of other people's models, in place.

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
    # Modules are imported at first use: `import spade_kernels` imports this package, but few programs need them.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def accelerate(model: nn.Module, *, strict: bool = False, measure: bool = False) -> Report:
    """Replaces the forward of each SPADE layer in a model, in place, by a faster one that gives equal results.

    Every module stays the same object, with its parameters, buffers, state_dict keys and hooks. Results and gradients
    differ from those of the original forward by rounding only. `freeze` makes the layers faster still for inference;
    `restore` undoes `accelerate`.

    Args:
        model: any module, on any device, before or after `.to()`, `.half()`, DDP or `torch.compile`.
        strict: if True, raise when a layer that looks like a SPADE layer cannot be replaced, and change nothing.
        measure: if True, the report also has the speed-up of every replaced layer, timed on the CPU on a 64 x 64 mask.

    Returns:
        A report of the replaced layers, and of those left alone with the reasons; `print` shows it as a table.

    Raises:
        TypeError: `model` is not an nn.Module.
        ValueError: `strict` is True and a layer cannot be replaced; the message names it and the reason.
    """
    from spade_kernels.accelerate.replace import replace_layers

    return replace_layers(model, strict=strict, measure=measure)


def restore(model: nn.Module) -> nn.Module:
    """Undoes `accelerate`: every accelerated module gets its former class and forward back. Returns the model."""
    from spade_kernels.accelerate.replace import restore_layers

    return restore_layers(model)
