"""The families of SPADE layers that `accelerate` knows, from the most special to the most general."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from spade_kernels.accelerate.layer import Family, Parts, bound_arguments, formulas, stock_class
from spade_kernels.accelerate.projection import Projection, Unsupported, hidden_layer, output_layer
from spade_kernels.condition import Segmap, as_condition, resized
from spade_kernels.functional import Weights
from spade_kernels.label_map import LabelMap

NORMS = ("param_free_norm", "first_norm", "norm", "norm_layer")


class Original(Family):
    """The layer of NVlabs/SPADE (Park et al. 2019), and layers with the same attribute names.

    OASIS has `first_norm`; semantic-diffusion-model has a group norm; LivePortrait, face-vid2vid, SadTalker and DaGAN
    have an instance norm and a dense condition; MONAI has its own convolution modules; CoCosNet has reflection padding
    and a function as its norm; BasicSR has no biases and scales by gamma, not 1 + gamma; TSIT has no hidden layer.
    """

    name = "SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        return _formulas(module, "mlp_shared", "mlp_gamma", "mlp_beta")


class StableSR(Original):
    """StableSR's layer: its forward(x_dic, segmap_dic, size=None) looks up the condition in a dict by its width.

    If `size` is given, it is the key, and x is looked up in a dict, too.
    """

    name = "StableSR SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        return super().candidates(module) if _takes(module, "segmap_dic") else []

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        x, conditions, *size = bound_arguments(module, args, kwargs)
        if size and size[0] is not None:
            return x[str(size[0])], [conditions[str(size[0])]]
        return x, [conditions[str(x.shape[-1])]]

    def example(self, module: nn.Module, x: Tensor, *conditions: Tensor) -> tuple[tuple, dict[str, Any]]:
        return (x, {str(x.shape[-1]): conditions[0]}), {}


class VirtualTryOn(Family):
    """VITON-HD's and HR-VITON's layer, which adds noise to x. Calls with a misalign_mask run the original forward."""

    name = "VITON SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        if "noise_scale" not in module._parameters:
            return []
        return _formulas(module, "conv_shared", "conv_gamma", "conv_beta")

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        x, conditions = super().inputs(module, *args, **kwargs)
        n, _, h, w = x.shape
        # The original forward draws one number per pixel on the CPU; equal seeds have to give equal noise.
        noise = torch.randn(n, w, h, 1).to(x.device) * module.get_parameter("noise_scale")
        return x + noise.transpose(1, 3), conditions


class SpatialNorm(Family):
    """MoVQ's SpatialNorm, as in diffusers and Kandinsky 2.

    Gamma and beta are 1 x 1 convolutions of a latent, optionally after one more convolution.
    """

    name = "SpatialNorm"

    def candidates(self, module: nn.Module) -> list[Parts]:
        return _formulas(module, "conv", "conv_y", "conv_b")


class Imaginaire(Family):
    """imaginaire's SpatiallyAdaptiveNorm, whose lists `mlps`, `gammas` and `betas` have an entry for each condition.

    Where `gammas` has none, the last convolution in `mlps` computes gamma and beta jointly.
    """

    name = "imaginaire SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        mlps = module._modules.get("mlps")
        if not isinstance(mlps, nn.ModuleList) or not len(mlps) or not hasattr(module, "norm"):
            return []
        if getattr(module, "is_hyper", False) or _takes(module, "norm_weights"):
            raise Unsupported("it predicts the weights of its convolutions for each image")
        scales = not getattr(module, "bias_only", False)
        projections = [self._projection(module, i, scales) for i in range(len(mlps))]
        # In a layer without a norm, the attribute `norm` is None, which is no submodule.
        return formulas(module._modules.get("norm") or nn.Identity(), *projections)

    def _projection(self, module: nn.Module, i: int, scales: bool) -> Projection:
        parts = list(module.get_submodule(f"mlps.{i}").children())
        gammas = module._modules.get("gammas")
        if isinstance(gammas, nn.ModuleList) and i < len(gammas):
            return Projection.of(module, f"mlps.{i}" if parts else None, f"gammas.{i}", f"betas.{i}", scales=scales)
        *first, last = parts or [nn.Identity()]
        shared = hidden_layer(f"mlps.{i}", nn.Sequential(*first)) if first else None
        return Projection.joined(shared, None, output_layer(f"mlps.{i}", last), scales)

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        x, *conditions = args if args else (kwargs["x"],)
        count = len(list(module.get_submodule("mlps").children()))
        return x, conditions + [None] * (count - len(conditions))


class FewShotVid2vid(Family):
    """few-shot-vid2vid's layer: its forward(x, maps, weights=None) takes a list of conditions.

    It has no hidden layers.
    """

    name = "few-shot-vid2vid SPADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        norm = module._modules.get("norm")
        if norm is None or not _takes(module, "maps"):
            return []
        if "mlp_gamma" not in module._modules:
            raise Unsupported("it takes the weights of its first convolution from its caller")
        suffixes = ["", *map(str, range(2, _conditions(module) + 1))]
        return formulas(norm, *(Projection.of(module, None, f"mlp_gamma{s}", f"mlp_beta{s}") for s in suffixes))

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        x, maps, *weights = bound_arguments(module, args, kwargs)
        if any(one is not None for one in weights):
            raise Unsupported("it was called with weights")
        maps = maps if isinstance(maps, list) else [maps]
        return x, maps + [None] * (_conditions(module) - len(maps))

    def example(self, module: nn.Module, x: Tensor, *conditions: Tensor) -> tuple[tuple, dict[str, Any]]:
        return (x, list(conditions)), {}


def _conditions(module: nn.Module) -> int:
    """Returns the number of conditions of a few-shot-vid2vid layer."""
    return sum(name.startswith("mlp_gamma") for name in module._modules)


class Clade(Family):
    """CLADE's layer (Tan et al. 2020): a table has one row of gamma and beta for each class.

    A pixel takes the row of the class whose plane is largest there. With instances, the last plane of the condition is
    their boundary, and the layer appends a convolution of it to y as one more channel.
    """

    name = "CLADE"

    def candidates(self, module: nn.Module) -> list[Parts]:
        affine, norm = module._modules.get("class_specified_affine"), module._modules.get("param_free_norm")
        if affine is None or norm is None:
            return []
        if affine._modules or set(affine._parameters) != {"weight", "bias"}:
            raise Unsupported("its gamma and beta also depend on distances")
        gamma, beta = affine._parameters["weight"], affine._parameters["bias"]
        if gamma is None or beta is None or gamma.dim() != 2 or gamma.shape != beta.shape:
            raise Unsupported("its tables do not have the shape (classes, channels)")
        classes, features = gamma.shape
        # Looking up two rows for each pixel takes about as long as 8 times the multiplications of 1 x 1 convolutions.
        work = 16 * classes * features
        projection = Projection(features, classes + _has_boundary(module), work, partial(_table_rows, gamma, beta))
        return formulas(norm, projection)

    def inputs(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Tensor, Sequence[Segmap | None]]:
        x, (condition,) = super().inputs(module, *args, **kwargs)
        if torch.compiler.is_compiling() or not isinstance(condition, Tensor) or condition.dim() != 4:
            raise Unsupported("its condition has no values that can be read, or is not (N, channels, H, W)")
        return x, [_classes(as_condition(condition, condition.shape[1]), x.shape[2:], _has_boundary(module))]

    def output(self, module: nn.Module, y: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not _has_boundary(module):
            return y
        _, (condition,) = super().inputs(module, *args, **kwargs)
        assert isinstance(condition, Tensor)
        boundary = resized(condition[:, -1:], y.shape[2:])
        return torch.cat((y, module.get_submodule("inst_conv")(boundary)), 1)


def _has_boundary(module: nn.Module) -> bool:
    return "inst_conv" in module._modules


def _table_rows(gamma: Tensor, beta: Tensor) -> Weights:
    """Returns 1 x 1 convolutions of one-hot planes that look up the rows of a table."""
    of_gamma, of_beta = ((rows.t()[:, :, None, None], rows.new_zeros(rows.shape[1])) for rows in (gamma, beta))
    return Weights(None, of_gamma, of_beta)


def _classes(condition: Segmap, size: Sequence[int], has_boundary: bool) -> LabelMap:
    """Returns the label map in which a pixel has the class with the largest plane; the boundary's does not count."""
    if isinstance(condition, LabelMap):
        channels = condition.channels - has_boundary

        def build() -> LabelMap:
            return LabelMap(condition.codebook()[:, :channels].argmax(1)[condition.codes], channels)

        return condition.cache.get(("largest", channels), build, condition.codes)
    planes = resized(condition, size).detach()
    planes = planes[:, :-1] if has_boundary else planes
    return LabelMap(planes.argmax(1), planes.shape[1])


class Refused(Family):
    """Recognizes layers that the kernels do not support, so that the report gives the reason.

    A module is recognized if it has all of `attributes`: names of submodules, parameters or other attributes.
    """

    def __init__(self, name: str, attributes: set[str], reason: str):
        self.name, self.attributes, self.reason = name, attributes, reason

    def candidates(self, module: nn.Module) -> list[Parts]:
        if not self.attributes <= {*module._modules, *module._parameters, *module.__dict__}:
            return []
        raise Unsupported(self.reason)


def _formulas(module: nn.Module, shared: str, gamma: str, beta: str) -> list[Parts]:
    """Returns the candidates of a layer whose convolutions have these names.

    The convolution `shared` may be missing; without gamma, beta or a norm the list is empty.
    """
    norms = (module._modules.get(name) or module.__dict__.get(name) for name in NORMS)
    norm = next((one for one in norms if callable(one)), None)
    if norm is None or module._modules.get(gamma) is None or module._modules.get(beta) is None:
        return []
    first = shared if module._modules.get(shared) is not None else None
    return formulas(norm, Projection.of(module, first, gamma, beta, module._modules.get("pad")))


def _takes(module: nn.Module, argument: str) -> bool:
    """Returns True if the module's original forward has a parameter of this name."""
    return argument in _parameters(stock_class(module))  # type: ignore[arg-type]


@functools.cache
def _parameters(module_class: type[nn.Module]) -> tuple[str, ...]:
    """Returns the names of the parameters of a class's forward."""
    return tuple(inspect.signature(module_class.forward).parameters)


_REFUSED = [
    Refused("INADE", {"fc_noise"}, "its gamma and beta depend on the noise of each instance"),
    Refused("SAFM", {"pre_seg", "pre_dis"}, "it predicts the weights of its convolutions from the label map"),
    Refused("InceptionSPADE", {"res_ops", "dw_ops"}, "its gamma and beta are sums of branches with batch norms"),
    Refused("AAD", {"conv1", "fc_1", "fc_2", "conv_f"}, "it blends two modulations by a mask that depends on x"),
    Refused("AAD", {"conv1", "fc_1", "fc_2", "conv_h"}, "it blends two modulations by a mask that depends on x"),
    Refused("SEAN", {"Spade", "blending_gamma"}, "it blends the modulation of the label map with that of style codes"),
    Refused("CoCosNet", {"mlp_gamma_example", "mlp_gamma_imagine"}, "it blends gamma and beta by a similarity map"),
]

FAMILIES: list[Family] = [
    *_REFUSED,
    StableSR(),
    VirtualTryOn(),
    Imaginaire(),
    FewShotVid2vid(),
    Clade(),
    SpatialNorm(),
    Original(),
]
"""All families, in the order in which they are tried: a module belongs to the first that has candidates for it.

Append a family of your own, or insert it before a more general one.
"""
