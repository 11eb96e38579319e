"""The families of SPADE layers that `accelerate` knows, the more special ones first."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from spade_kernels.accelerate.layer import Family, Parts, Unsupported, convolution, shared_convolution
from spade_kernels.condition import Segmap

NORMS = ("param_free_norm", "first_norm", "norm", "norm_layer")


def parts_of(module: nn.Module, shared: str, gamma: str, beta: str, norms: tuple[str, ...] = NORMS) -> list[Parts]:
    """Candidates of a layer whose parts have these names; empty if it has no such parts."""
    found = [getattr(module, name, None) for name in (shared, gamma, beta)]
    norm = next((getattr(module, name) for name in norms if isinstance(getattr(module, name, None), nn.Module)), None)
    if norm is None or not all(isinstance(part, nn.Module) for part in found):
        return []
    conv, slope = shared_convolution(shared, found[0])
    of_gamma, of_beta = convolution(gamma, found[1]), convolution(beta, found[2])
    if not conv.kernel_size == of_gamma.kernel_size == of_beta.kernel_size:
        raise Unsupported(f"{shared}, {gamma} and {beta} have kernels of different sizes")
    if not conv.out_channels == of_gamma.in_channels == of_beta.in_channels:
        raise Unsupported(f"{gamma} and {beta} do not take the channels that {shared} gives")
    return [Parts(norm, conv, of_gamma, of_beta, slope, offset) for offset in (1.0, 0.0)]


class Original(Family):
    """NVlabs/SPADE (Park et al. 2019) and layers with its attributes.

    OASIS has `first_norm`; semantic-diffusion-model has a group norm; LivePortrait, face-vid2vid, SadTalker and DaGAN
    have an instance norm and a dense condition; MONAI has its own convolution modules.
    """

    name = "SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        return parts_of(module, "mlp_shared", "mlp_gamma", "mlp_beta")


class StableSR(Family):
    """StableSR: forward(x_dic, segmap_dic, size=None) takes the condition of x's width from a dict."""

    name = "StableSR SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        if "segmap_dic" not in _parameters(module):
            return []
        return parts_of(module, "mlp_shared", "mlp_gamma", "mlp_beta")

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Segmap]:
        x, conditions = args[0] if args else kwargs["x_dic"], args[1] if len(args) > 1 else kwargs["segmap_dic"]
        size = args[2] if len(args) > 2 else kwargs.get("size")
        return x, conditions[str(x.shape[-1] if size is None else size)]

    def example(self, module: nn.Module, x: Tensor, condition: Tensor) -> tuple[tuple, dict[str, Any]]:
        return (x, {str(x.shape[-1]): condition}), {}


class SpatialNorm(Family):
    """diffusers and MoVQ: norm(f) * conv_y(zq) + conv_b(zq), both 1 x 1, without a hidden layer."""

    name = "SpatialNorm"

    def candidates(self, module: nn.Module) -> list[Parts]:
        if all(isinstance(getattr(module, name, None), nn.Module) for name in ("norm_layer", "conv_y", "conv_b")):
            raise Unsupported("a layer without a hidden convolution is faster as it is")
        return []


def _parameters(module: nn.Module) -> tuple[str, ...]:
    code = getattr(type(module).forward, "__code__", None)
    return () if code is None else code.co_varnames[: code.co_argcount]


FAMILIES: list[Family] = [StableSR(), SpatialNorm(), Original()]
"""The first family with candidates for a module is its. Append to it, or insert before, to add one."""
