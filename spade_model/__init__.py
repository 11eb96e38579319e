"""spade_model: the SPADE image synthesis system on top of spade_kernels."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spade_model.config import DataConfig, ModelConfig, TrainConfig
    from spade_model.errors import UserError
    from spade_model.generation import LoadedModel, generate, load_model
    from spade_model.training import train

__all__ = ["DataConfig", "LoadedModel", "ModelConfig", "TrainConfig", "UserError", "generate", "load_model", "train"]

_MODULES = {
    "config": ("DataConfig", "ModelConfig", "TrainConfig"),
    "errors": ("UserError",),
    "generation": ("LoadedModel", "generate", "load_model"),
    "training": ("train",),
}


def __getattr__(name: str) -> Any:
    # Modules are imported on first use, because the command line imports this package too: it must start without the
    # time that torch needs, and report missing packages of the extra "model" itself.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"spade_model.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
