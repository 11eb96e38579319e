"""Replaces the SPADE layers and residual blocks of a model, once a probe has compared results and gradients."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

from spade_kernels.accelerate.block import SLOPES, AcceleratedBlock, ResidualBlock, is_block
from spade_kernels.accelerate.families import FAMILIES
from spade_kernels.accelerate.layer import (
    Accelerated,
    AcceleratedLayer,
    Family,
    Parts,
    restore_class,
    swap_class,
)
from spade_kernels.accelerate.probe import Differs, probe
from spade_kernels.accelerate.projection import Unsupported
from spade_kernels.accelerate.report import Replaced, Report
from spade_kernels.accelerate.speed import speedup
from spade_kernels.layers import SPADE

# From this number of multiplications in a call on, measurements found the kernels faster than the original forward.
_LEAST_WORK = 100_000_000


def replace_layers(model: nn.Module, *, strict: bool, measure: bool) -> Report:
    """Implements `accelerate`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"accelerate takes an nn.Module, got {type(model).__name__}")
    report = Report()
    found: list[tuple[nn.Module, Family, int]] = []
    probed: dict[tuple, tuple[int, float] | str] = {}
    for name, module in _modules(model):
        if isinstance(module, (Accelerated, SPADE)):
            continue
        try:
            if isinstance(module, torch.jit.ScriptModule):
                _refuse_scripted(module)
                continue
            match = _recognized(module)
            if match is None:
                continue
            family, candidates = match
            key = (family, type(module), _structure(module))
            if key not in probed:
                probed[key] = _probed(module, family, candidates)
            answer = probed[key]
            if isinstance(answer, str):
                raise Unsupported(answer)
        except Unsupported as error:
            report.left.append((name, type(module).__name__, str(error)))
            continue
        choice, difference = answer
        found.append((module, family, choice))
        report.replaced.append(Replaced(name, type(module).__name__, family.name, difference))
    if strict and report.left:
        name, layer, reason = report.left[0]
        raise ValueError(f"{len(report.left)} layers cannot be accelerated; {name or 'the model'} ({layer}): {reason}")
    for (module, family, choice), entry in zip(found, report.replaced, strict=True):
        swap_class(module, AcceleratedLayer, _spade_family=family, _spade_choice=choice, _spade_least_work=_LEAST_WORK)
        if measure:
            entry.speedup = speedup(module)
    _accelerate_blocks(model, report)
    return report


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields names and modules of a model. Wrappers of torch.compile, which imitate their module, are left out."""
    return ((name, module) for name, module in model.named_modules() if "_orig_mod" not in module._modules)


def _accelerate_blocks(model: nn.Module, report: Report) -> None:
    probed: dict[str, tuple[int, float] | None] = {}
    for name, module in _modules(model):
        if isinstance(module, Accelerated) or not is_block(module):
            continue
        key = _structure(module)
        if key not in probed:
            probed[key] = _probed_block(module)
        answer = probed[key]
        if answer is not None:
            report.replaced.append(Replaced(name, type(module).__name__, ResidualBlock.name, answer[1]))
            swap_class(module, AcceleratedBlock, _spade_choice=answer[0])


def _probed_block(block: nn.Module) -> tuple[int, float] | None:
    """Returns the index in SLOPES of the block's activation, and the probe's error; None if no slope fits."""
    layers = {name: part for name, part in block.named_modules() if isinstance(part, AcceleratedLayer)}

    def change(copied: nn.Module, choice: int) -> None:
        for name, layer in layers.items():
            own = {"_spade_family": layer._spade_family, "_spade_choice": layer._spade_choice}
            swap_class(copied.get_submodule(name), AcceleratedLayer, **own)
        swap_class(copied, AcceleratedBlock, _spade_choice=choice)

    parts = layers["norm_0"].parts()
    assert parts is not None
    channels = parts.channels
    for choice in range(len(SLOPES)):
        try:
            return choice, probe(block, partial(change, choice=choice), ResidualBlock(), channels)
        except Exception:  # The block stays as it is: its layers are accelerated all the same.
            continue
    return None


def restore_layers(model: nn.Module) -> nn.Module:
    """Implements `restore`."""
    for module in model.modules():
        if isinstance(module, Accelerated):
            restore_class(module)
    return model


def _recognized(module: nn.Module) -> tuple[Family, list[Parts]] | None:
    for family in FAMILIES:
        try:
            candidates = family.candidates(module)
        except Unsupported as reason:
            raise Unsupported(f"{family.name}: {reason}") from None
        if candidates:
            _require_usable(module)
            return family, candidates
    return None


def _refuse_scripted(module: torch.jit.ScriptModule) -> None:
    if any(name == "mlp_gamma" or name == "gammas" for name, _ in module.named_children()):
        raise Unsupported("it is scripted; accelerate the model before torch.jit.script")


_INTERNAL = frozenset(nn.Module().__dict__)


def _structure(module: nn.Module) -> str:
    """Returns a text that is equal for modules that differ only in parameter values, for which one probe is enough."""
    own = [
        (name, {k: v for k, v in part.__dict__.items() if k not in _INTERNAL}) for name, part in module.named_modules()
    ]
    shapes = [(name, tuple(t.shape)) for name, t in module.state_dict().items()]
    return repr((module, own, shapes))


def _require_usable(module: nn.Module) -> None:
    """Raises Unsupported for a module that cannot be copied or called."""
    tensors = [*module.parameters(), *module.buffers()]
    if any(isinstance(t, (nn.UninitializedParameter, nn.UninitializedBuffer)) for t in tensors):
        raise Unsupported("its parameters are not initialized; run the model once")
    if any(t.is_meta for t in tensors):
        raise Unsupported("it is on the meta device; accelerate the model when it has values")
    if not all(t.is_floating_point() for t in module.parameters()):
        raise Unsupported("it is quantized")


def _swap_layer(module: nn.Module, family: Family, choice: int) -> None:
    swap_class(module, AcceleratedLayer, _spade_family=family, _spade_choice=choice)
    assert isinstance(module, AcceleratedLayer)
    if module.parts() is None:
        raise Differs("its family does not recognize it once it is accelerated")


def _probed(module: nn.Module, family: Family, candidates: list[Parts]) -> tuple[int, float] | str:
    """Returns the index of the candidate that equals the module, and the probe's error; or why there is none."""
    reasons = []
    for choice, parts in enumerate(candidates):
        change = partial(_swap_layer, family=family, choice=choice)
        try:
            return choice, probe(module, change, family, parts.channels)
        except Differs as reason:
            reasons.append(str(reason))
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}")
    return reasons[0]
