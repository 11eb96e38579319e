"""The families of SPADE layers that `accelerate` knows, the more special ones first."""

from __future__ import annotations

import functools
import inspect
from typing import Any

from torch import Tensor, nn

from spade_kernels.accelerate.layer import (
    Family,
    Parts,
    Unsupported,
    bound_arguments,
    convolution,
    leaves,
    normed_convolution,
    shared_convolution,
    stock_class,
)
from spade_kernels.condition import Segmap
from spade_kernels.functional import Weights

NORMS = ("param_free_norm", "first_norm", "norm", "norm_layer")


def parts_of(module: nn.Module, shared: str, gamma: str, beta: str, norms: tuple[str, ...] = NORMS) -> list[Parts]:
    """Candidates of a layer whose parts have these names; empty if it has no such parts."""
    modules = module._modules
    norm = next((modules[name] for name in norms if modules.get(name) is not None), None)
    first, second, third = (modules.get(name) for name in (shared, gamma, beta))
    if norm is None or first is None or second is None or third is None:
        return []
    conv, slope = shared_convolution(shared, first)
    of_gamma, gamma_eps = normed_convolution(gamma, second)
    of_beta, beta_eps = normed_convolution(beta, third)
    if gamma_eps != beta_eps:
        raise Unsupported(f"{gamma} and {beta} are normalized differently")
    return candidates(norm, conv, Weights.of(conv, of_gamma, of_beta, slope), gamma_eps)


def candidates(norm: nn.Module, shared: nn.Conv2d, weights: Weights, table_eps: float | None = None) -> list[Parts]:
    """The two formulas that are in use: with a scale of 1 + gamma, and of gamma.

    Raises:
        Unsupported: the convolutions do not fit together.
    """
    if not weights.shared[0].shape[2:] == weights.gamma[0].shape[2:] == weights.beta[0].shape[2:]:
        raise Unsupported("its convolutions have kernels of different sizes")
    if not shared.out_channels == weights.gamma[0].shape[1] == weights.beta[0].shape[1]:
        raise Unsupported("gamma and beta do not take the channels that the hidden layer has")
    return [Parts(norm, weights._replace(scale_offset=offset), table_eps) for offset in (1.0, 0.0)]


class Original(Family):
    """NVlabs/SPADE (Park et al. 2019) and layers with its attributes.

    OASIS has `first_norm`; semantic-diffusion-model has a group norm; LivePortrait, face-vid2vid, SadTalker and DaGAN
    have an instance norm and a dense condition; MONAI has its own convolution modules.
    """

    name = "SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        return parts_of(module, "mlp_shared", "mlp_gamma", "mlp_beta")


class StableSR(Family):
    """StableSR's layer: forward(x_dic, segmap_dic, size=None) finds the condition in a dict; with a size, x too."""

    name = "StableSR SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        if "segmap_dic" not in _parameters(stock_class(module)):  # type: ignore[arg-type]
            return []
        return parts_of(module, "mlp_shared", "mlp_gamma", "mlp_beta")

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Segmap]:
        x, conditions, *size = bound_arguments(module, args, kwargs)
        if size and size[0] is not None:
            return x[str(size[0])], conditions[str(size[0])]
        return x, conditions[str(x.shape[-1])]

    def example(self, module: nn.Module, x: Tensor, condition: Tensor) -> tuple[tuple, dict[str, Any]]:
        return (x, {str(x.shape[-1]): condition}), {}


class Imaginaire(Family):
    """imaginaire's SpatiallyAdaptiveNorm with one condition: `mlps`, and `gammas` and `betas` or a joint projection."""

    name = "imaginaire SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        norm, mlps = module._modules.get("norm"), module._modules.get("mlps")
        gammas, betas = module._modules.get("gammas"), module._modules.get("betas")
        if norm is None or not isinstance(mlps, nn.ModuleList):
            return []
        if len(mlps) != 1:
            raise Unsupported(f"it has {len(mlps)} conditions, not one")
        if isinstance(gammas, nn.ModuleList) and len(gammas) == 1 and isinstance(betas, nn.ModuleList):
            conv, slope = shared_convolution("mlps.0", mlps[0])
            gamma, beta = convolution("gammas.0", gammas[0]), convolution("betas.0", betas[0])
            return candidates(norm, conv, Weights.of(conv, gamma, beta, slope))
        *first, last = list(leaves(mlps[0])) or [mlps[0]]
        conv, slope = shared_convolution("mlps.0", nn.Sequential(*first))
        joint = convolution("mlps.0", last)
        weights = Weights.of(conv, joint, joint, slope)
        of_gamma, of_beta = zip(*(t.chunk(2) for t in weights.gamma), strict=True)
        return candidates(norm, conv, weights._replace(gamma=of_gamma, beta=of_beta))

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Segmap]:
        x, *conditions = args if args else (kwargs["x"],)
        if len(conditions) != 1 or conditions[0] is None:
            raise Unsupported("it takes one condition")
        return x, conditions[0]


@functools.cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the parameters of a class's forward."""
    return tuple(inspect.signature(module_class.forward).parameters)


FAMILIES: list[Family] = [StableSR(), Imaginaire(), Original()]
"""The first family with candidates for a module is its. Append to it, or insert before, to add one."""
