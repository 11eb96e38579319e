"""SPADE layers of other people's models, written here from their public behaviour, for the tests of `accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

from spade_kernels.testing import random_label_map

CHANNELS, CLASSES, HIDDEN = 8, 5, 6
X, SIZE = (2, CHANNELS, 6, 8), (12, 16)


class StandIn(nn.Module):
    """A layer that takes x and one or more conditions.

    Attributes:
        condition_channels: channels of each condition. resizes: False if conditions must have the size of x.
    """

    condition_channels: ClassVar[tuple[int, ...]] = (CLASSES,)
    resizes = True

    def call(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self(x, *conditions)


def conv(fin: int, fout: int, k: int = 3, **kwargs: Any) -> nn.Conv2d:
    return nn.Conv2d(fin, fout, k, padding=k // 2, **kwargs)


class Original(StandIn):
    """The layer of NVlabs/SPADE, and the base of those that have its attribute names."""

    norm_name = "param_free_norm"

    def __init__(self, norm: Any, channels: int = CHANNELS, classes: int = CLASSES, k: int = 3, **kwargs: Any):
        super().__init__()
        setattr(self, self.norm_name, norm)
        self.mlp_shared = nn.Sequential(conv(classes, HIDDEN, k, **kwargs), nn.ReLU())
        self.mlp_gamma = conv(HIDDEN, channels, k, **kwargs)
        self.mlp_beta = conv(HIDDEN, channels, k, **kwargs)

    def maps(self, x: Tensor, segmap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.mlp_shared(F.interpolate(segmap, x.shape[2:]))
        return getattr(self, self.norm_name)(x), self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        normalized, gamma, beta = self.maps(x, segmap)
        return normalized * (1 + gamma) + beta


class Oasis(Original):
    norm_name = "first_norm"


class Diffusion(Original):
    norm_name = "norm"


class WithoutOne(Original):
    """BasicSR's layer, which scales by gamma instead of 1 + gamma."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        normalized, gamma, beta = self.maps(x, segmap)
        return normalized * gamma + beta


class CcFpse(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        if segmap.shape[2] != x.shape[2]:
            segmap = F.interpolate(segmap, x.shape[2:])
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


def positional_norm(x: Tensor) -> Tensor:
    return (x - x.mean(1, keepdim=True)) / (x.var(1, keepdim=True) + 1e-5).sqrt()


class CoCosNet(Original):
    """CoCosNet's layer: it pads in modules of their own, and takes an optional similarity map."""

    def __init__(self, norm: Any):
        super().__init__(norm)
        self.pad = nn.ReflectionPad2d(1)
        self.mlp_shared = nn.Sequential(nn.ReflectionPad2d(1), nn.Conv2d(CLASSES, HIDDEN, 3), nn.ReLU())
        self.mlp_gamma, self.mlp_beta = (nn.Conv2d(HIDDEN, CHANNELS, 3) for _ in range(2))

    def forward(self, x: Tensor, segmap: Tensor, similarity_map: Tensor | None = None) -> Tensor:
        hidden = self.pad(self.mlp_shared(F.interpolate(segmap, x.shape[2:])))
        gamma, beta = self.mlp_gamma(hidden), self.mlp_beta(hidden)
        if similarity_map is not None:
            gamma, beta = gamma * similarity_map, beta * similarity_map
        return self.param_free_norm(x) * (1 + gamma) + beta


class StableSR(Original):
    resizes = False

    def forward(self, x_dic: Any, segmap_dic: dict[str, Tensor], size: int | None = None) -> Tensor:
        x, segmap = (
            (x_dic, segmap_dic[str(x_dic.shape[-1])]) if size is None else (x_dic[str(size)], segmap_dic[str(size)])
        )
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)

    def call(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self(x, {str(x.shape[-1]): conditions[0]})


class VirtualTryOn(StandIn):
    """HR-VITON's layer. VITON-HD's always moves its noise to a GPU, so it cannot be tried on a CPU."""

    resizes = False

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.noise_scale = nn.Parameter(torch.randn(CHANNELS))
        self.param_free_norm = norm
        self.conv_shared = nn.Sequential(conv(CLASSES, HIDDEN), nn.ReLU())
        self.conv_gamma, self.conv_beta = conv(HIDDEN, CHANNELS), conv(HIDDEN, CHANNELS)

    def forward(self, x: Tensor, seg: Tensor, misalign_mask: Tensor | None = None) -> Tensor:
        n, _, h, w = x.shape
        x = x + (torch.randn(n, w, h, 1) * self.noise_scale).transpose(1, 3)
        normalized = self.param_free_norm(x) if misalign_mask is None else self.param_free_norm(x * misalign_mask)
        hidden = self.conv_shared(seg)
        return normalized * (1 + self.conv_gamma(hidden)) + self.conv_beta(hidden)


class Normed(Original):
    """MONAI's layer: a leaky ReLU, and instance norms of gamma and beta, all in nested modules."""

    def __init__(self, norm: nn.Module):
        super().__init__(norm)
        self.mlp_shared = nn.Sequential(self.mlp_shared[0], nn.Sequential(nn.LeakyReLU()))
        self.mlp_gamma = nn.Sequential(self.mlp_gamma, nn.Sequential(nn.InstanceNorm2d(CHANNELS)))
        self.mlp_beta = nn.Sequential(self.mlp_beta, nn.Sequential(nn.InstanceNorm2d(CHANNELS)))


class Tsit(StandIn):
    """TSIT's layer: it has no hidden layer, and its condition is a feature map of the size of x."""

    resizes = False

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.param_free_norm = norm
        self.mlp_gamma, self.mlp_beta = conv(CLASSES, CHANNELS), conv(CLASSES, CHANNELS)

    def forward(self, x: Tensor, feat: Tensor) -> Tensor:
        return self.param_free_norm(x) * (1 + self.mlp_gamma(feat)) + self.mlp_beta(feat)


class FewShot(StandIn):
    """few-shot-vid2vid's layer: it takes a list of conditions and, optionally, the weights for them."""

    condition_channels = (CLASSES, 3)

    def __init__(self, k: int):
        super().__init__()
        self.norm = nn.InstanceNorm2d(CHANNELS, eps=0.1)
        for suffix, count in zip(("", "2"), self.condition_channels, strict=True):
            self.add_module(f"mlp_gamma{suffix}", conv(count, CHANNELS, k))
            self.add_module(f"mlp_beta{suffix}", conv(count, CHANNELS, k))

    def forward(self, x: Tensor, maps: list[Tensor | None], weights: Any = None) -> Tensor:
        y = self.norm(x)
        for suffix, one in zip(("", "2"), maps, strict=False):
            if one is not None:
                condition = F.interpolate(one, x.shape[2:])
                gamma, beta = (getattr(self, name + suffix)(condition) for name in ("mlp_gamma", "mlp_beta"))
                y = y * (1 + gamma) + beta
        return y

    def call(self, x: Tensor, *conditions: Tensor) -> Tensor:
        return self(x, list(conditions))


class SpatialNorm(StandIn):
    """The layer of diffusers and Kandinsky: 1 x 1 convolutions of a latent, optionally after a 3 x 3 one."""

    def __init__(self, add_conv: bool = False):
        super().__init__()
        self.norm_layer = nn.GroupNorm(4, CHANNELS, eps=1e-6)
        if add_conv:
            self.conv = conv(CLASSES, CLASSES)
        self.conv_y, self.conv_b = conv(CLASSES, CHANNELS, 1), conv(CLASSES, CHANNELS, 1)

    def forward(self, f: Tensor, zq: Tensor) -> Tensor:
        zq = F.interpolate(zq, f.shape[2:])
        zq = self.conv(zq) if hasattr(self, "conv") else zq
        return self.norm_layer(f) * self.conv_y(zq) + self.conv_b(zq)


class ClassAffine(nn.Module):
    def __init__(self, distances: bool):
        super().__init__()
        self.weight, self.bias = (nn.Parameter(torch.randn(CLASSES, CHANNELS)) for _ in range(2))
        if distances:
            self.dist_conv_w, self.dist_conv_b = nn.Conv2d(2, 1, 1), nn.Conv2d(2, 1, 1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        ids = mask.argmax(1)
        gamma, beta = (F.embedding(ids, table).permute(0, 3, 1, 2) for table in (self.weight, self.bias))
        return x * gamma + beta


class Clade(StandIn):
    def __init__(self, norm: nn.Module, instances: bool = False, distances: bool = False):
        super().__init__()
        self.param_free_norm = norm
        self.class_specified_affine = ClassAffine(distances)
        self.instances = instances
        if instances:
            self.condition_channels = (CLASSES + 1,)  # type: ignore[misc]
            self.inst_conv = nn.Conv2d(1, 1, 1)

    def forward(self, x: Tensor, segmap: Tensor, input_dist: Tensor | None = None) -> Tensor:
        segmap = F.interpolate(segmap, x.shape[2:])
        y = self.class_specified_affine(self.param_free_norm(x), segmap[:, :CLASSES])
        return torch.cat((y, self.inst_conv(segmap[:, CLASSES:])), 1) if self.instances else y


def plain(module: nn.Module) -> nn.Module:
    return module


class ConvBlock(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Imaginaire(StandIn):
    def __init__(
        self,
        separate: bool = True,
        conditions: tuple[int, ...] = (CLASSES,),
        *,
        hidden: bool = True,
        wrap: Callable[[nn.Module], nn.Module] = plain,
        bias_only: bool = False,
        norm: bool = True,
        k: int = 3,
    ):
        super().__init__()
        self.norm = nn.InstanceNorm2d(CHANNELS, affine=True) if norm else None
        self.separate, self.bias_only, self.condition_channels = separate, bias_only, conditions  # type: ignore[misc]
        self.mlps, self.gammas, self.betas = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for count in conditions:
            layers = [ConvBlock(wrap(conv(count, HIDDEN, k)), nn.ReLU())] if hidden else []
            last = HIDDEN if hidden else count
            if separate:
                self.gammas.append(ConvBlock(wrap(conv(last, CHANNELS, k))))
                self.betas.append(ConvBlock(wrap(conv(last, CHANNELS, k))))
            else:
                layers.append(ConvBlock(wrap(conv(last, 2 * CHANNELS, k))))
            self.mlps.append(nn.Sequential(*layers))

    def forward(self, x: Tensor, *cond_inputs: Tensor | None, **_kwargs: Any) -> Tensor:
        y = x if self.norm is None else self.norm(x)
        for i, condition in enumerate(cond_inputs):
            if condition is None:
                continue
            hidden = self.mlps[i](F.interpolate(condition, x.shape[2:]))
            gamma, beta = (self.gammas[i](hidden), self.betas[i](hidden)) if self.separate else hidden.chunk(2, 1)
            y = y + beta if self.bias_only else y * (1 + gamma) + beta
        return y


def instance() -> nn.Module:
    return nn.InstanceNorm2d(CHANNELS)


def batch_norm(channels: int = CHANNELS) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


def wrapped(layer: Original, wrap: Callable[[nn.Module], nn.Module]) -> Original:
    """Wraps two of the layer's convolutions, for spectral norm and the like, and returns the layer."""
    with torch.no_grad():  # A weight that is computed with a gradient cannot be copied.
        layer.mlp_shared[0], layer.mlp_gamma = wrap(layer.mlp_shared[0]), wrap(layer.mlp_gamma)
    return layer


def with_kernels(shared: int, gamma: int) -> Original:
    layer = Original(instance(), k=shared)
    layer.mlp_gamma, layer.mlp_beta = conv(HIDDEN, CHANNELS, gamma), conv(HIDDEN, CHANNELS, gamma)
    return layer


LAYERS: dict[str, Callable[[], StandIn]] = {
    "original, instance": lambda: Original(instance()),
    "original, batch": lambda: Original(batch_norm()),
    "original, 5x5": lambda: Original(instance(), k=5),
    "original, 1x1 without biases": lambda: Original(instance(), k=1, bias=False),
    "3x3, then 1x1": lambda: with_kernels(3, 1),
    "1x1, then 5x5": lambda: with_kernels(1, 5),
    "affine batch": lambda: Original(nn.BatchNorm2d(CHANNELS)),
    "norm per pixel": lambda: Original(nn.Softmax(1)),
    "reflection padding": lambda: Original(instance(), padding_mode="reflect"),
    "spectral norm": lambda: wrapped(Original(instance()), spectral_norm),
    "weight norm": lambda: wrapped(Original(instance()), weight_norm),
    "spectral norm as parametrization": lambda: wrapped(Original(instance()), parametrizations.spectral_norm),
    "OASIS": lambda: Oasis(batch_norm()),
    "semantic diffusion": lambda: Diffusion(nn.GroupNorm(4, CHANNELS, affine=False)),
    "affine group": lambda: Diffusion(nn.GroupNorm(4, CHANNELS)),
    "BasicSR": lambda: WithoutOne(instance(), bias=False),
    "CC-FPSE": lambda: CcFpse(batch_norm()),
    "CoCosNet": lambda: CoCosNet(positional_norm),
    "StableSR": lambda: StableSR(nn.GroupNorm(4, CHANNELS)),
    "VITON": lambda: VirtualTryOn(instance()),
    "MONAI": lambda: Normed(instance()),
    "TSIT": lambda: Tsit(instance()),
    "few-shot-vid2vid": lambda: FewShot(1),
    "few-shot-vid2vid, 3x3": lambda: FewShot(3),
    "SpatialNorm": SpatialNorm,
    "SpatialNorm with a convolution": lambda: SpatialNorm(add_conv=True),
    "CLADE": lambda: Clade(batch_norm()),
    "CLADE with instances": lambda: Clade(batch_norm(), instances=True),
    "imaginaire": Imaginaire,
    "imaginaire, joint": lambda: Imaginaire(separate=False),
    "imaginaire, joint 5x5, spectral norm": lambda: Imaginaire(separate=False, wrap=spectral_norm, k=5),
    "imaginaire, two conditions": lambda: Imaginaire(conditions=(CLASSES, 3), wrap=spectral_norm),
    "imaginaire, joint, no hidden layer": lambda: Imaginaire(separate=False, conditions=(CLASSES, 3), hidden=False),
    "imaginaire, no hidden layer, no norm": lambda: Imaginaire(hidden=False, norm=False),
    "imaginaire, beta only": lambda: Imaginaire(separate=False, bias_only=True),
}


def planes(
    kind: str = "blobs", size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32, classes: int = CLASSES
) -> Tensor:
    return random_label_map(kind, (2, *size), classes).one_hot(dtype).contiguous()


def conditions(layer: StandIn) -> dict[str, list[Tensor]]:
    """Returns conditions by kind.

    If the layer resizes them, small ones have half the size of x, and others twice its size.
    """
    size, small = (SIZE, (3, 4)) if layer.resizes else (X[2:], X[2:])
    torch.manual_seed(1)
    return {
        "one-hot": [planes(size=size, classes=count) for count in layer.condition_channels],
        "dense": [torch.rand(2, count, *size) for count in layer.condition_channels],
        "small": [torch.rand(2, count, *small) for count in layer.condition_channels],
        "zero": [torch.zeros(2, count, *size) for count in layer.condition_channels],
    }


def results(layer: nn.Module, given: list[Tensor] | Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """Returns the result of a layer, its gradients, and its buffers after the call, by name."""
    torch.manual_seed(2)
    given = [given] if isinstance(given, Tensor) else given
    x, given = torch.randn(X, dtype=dtype, requires_grad=True), [one.to(dtype) for one in given]
    layer.zero_grad()
    y = layer.call(x, *given) if isinstance(layer, StandIn) else layer(x, *given)
    (y * torch.arange(y.numel(), dtype=dtype).view(y.shape).sin()).sum().backward()
    found = {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {name: t.detach().clone() for name, t in found.items()} | dict(layer.named_buffers())


class Block(nn.Module):
    """The residual block of NVlabs/SPADE, OASIS, LivePortrait and others."""

    def __init__(
        self,
        fin: int,
        fout: int,
        slope: float = 0.2,
        *,
        wrap: Callable[[nn.Module], nn.Module] = spectral_norm,
        norm: Callable = nn.InstanceNorm2d,
        layer: Callable[..., nn.Module] = Original,
    ):
        super().__init__()
        middle = min(fin, fout)
        self.conv_0, self.conv_1 = wrap(conv(fin, middle)), wrap(conv(middle, fout))
        self.norm_0, self.norm_1 = layer(norm(fin), fin), layer(norm(middle), middle)
        self.learned_shortcut, self.slope = fin != fout, slope
        if self.learned_shortcut:
            self.conv_s = wrap(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = layer(norm(fin), fin)

    def forward(self, x: Tensor, seg: Tensor, more: Tensor | None = None) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), self.slope))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(dx, seg), self.slope))
