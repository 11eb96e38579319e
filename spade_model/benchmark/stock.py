"""The baseline of the benchmarks: the SPADE generator (Park et al. 2019, appendix A) in stock PyTorch operators.

It uses no kernel and no layer of this package, so that the baseline does not change when those become faster.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, spectral_norm

from spade_kernels import SPADE, LabelMap
from spade_model.networks import SPADEGenerator

Variant = Literal["eager", "tuned", "spade-free"]
_HIDDEN, _NEGATIVE_SLOPE = 128, 0.2


def one_hot(
    mask: LabelMap,
    size: tuple[int, int] | None = None,
    dtype: torch.dtype = torch.float32,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Resizes the labels and edges of a mask to `size` and returns their one-hot planes (N, channels, H, W)."""
    labels, edges = mask.labels.unsqueeze(1), mask.edges
    if size is not None:
        # F.interpolate takes no integers; float64 represents every label exactly.
        labels = F.interpolate(labels.double(), size=size, mode="nearest").long()
        edges = None if edges is None else F.interpolate(edges.unsqueeze(1).double(), size=size, mode="nearest")[:, 0]
    n, _, height, width = labels.shape
    shape = (n, mask.channels, height, width)
    planes = torch.empty(shape, dtype=dtype, device=labels.device, memory_format=memory_format).zero_()
    planes.scatter_(1, labels, 1.0)
    if edges is not None:
        planes[:, -1] = edges
    return planes


class StockSPADE(nn.Module):
    """SPADE layer with batch norm and 3 x 3 convolutions, with the state_dict keys of `spade_kernels.SPADE`."""

    def __init__(self, norm_nc: int, label_nc: int):
        super().__init__()
        self.param_free_norm = nn.BatchNorm2d(norm_nc, affine=False)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, _HIDDEN, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(_HIDDEN, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(_HIDDEN, norm_nc, 3, padding=1)
        self.joint: nn.Conv2d | None = None

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        """Normalizes and modulates x (N, norm_nc, h, w) by one-hot planes (N, label_nc, H, W); returns x's shape."""
        normalized = self.param_free_norm(x)
        hidden = self.mlp_shared(F.interpolate(planes, size=x.shape[2:], mode="nearest"))
        if self.joint is None:
            gamma, beta = self.mlp_gamma(hidden), self.mlp_beta(hidden)
        else:
            gamma, beta = self.joint(hidden).chunk(2, 1)
        return normalized * (1 + gamma) + beta

    @torch.no_grad()
    def join(self) -> None:
        """Replaces the modules mlp_gamma and mlp_beta by one convolution that computes both."""
        gamma, beta = self.mlp_gamma, self.mlp_beta
        weight = torch.cat((gamma.weight, beta.weight))
        self.joint = nn.Conv2d(_HIDDEN, len(weight), 3, padding=1, dtype=weight.dtype)
        self.joint.weight.copy_(weight)
        self.joint.bias.copy_(torch.cat((gamma.bias, beta.bias)))  # type: ignore[union-attr, arg-type]
        del self.mlp_gamma, self.mlp_beta


def stock_layer(layer: SPADE, label_nc: int, *, joined: bool) -> StockSPADE:
    """Returns a stock copy of a layer in the same mode (train or eval), in float32 on the CPU.

    Args:
        layer: a SPADE layer built with "spadesyncbatch3x3".
        label_nc: condition channels.
        joined: compute gamma and beta by one convolution.
    """
    stock = StockSPADE(layer.mlp_gamma.out_channels, label_nc).train(layer.training)
    stock.load_state_dict(layer.state_dict())
    if joined:
        stock.join()
    return stock


class _Deleted(nn.Module):
    """Replaces a SPADE layer and returns its input."""

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        return x


class StockBlock(nn.Module):
    """The residual block of the generator."""

    def __init__(self, fin: int, fout: int, label_nc: int):
        super().__init__()
        middle = min(fin, fout)
        self.conv_0 = spectral_norm(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, fout, 3, padding=1))
        self.norm_0: nn.Module = StockSPADE(fin, label_nc)
        self.norm_1: nn.Module = StockSPADE(middle, label_nc)
        self.conv_s: nn.Module | None = None
        if fin != fout:
            self.conv_s = spectral_norm(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s: nn.Module = StockSPADE(fin, label_nc)

    def forward(self, x: Tensor, planes: Tensor) -> Tensor:
        shortcut = x if self.conv_s is None else self.conv_s(self.norm_s(x, planes))
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, planes), _NEGATIVE_SLOPE))
        dx = self.conv_1(F.leaky_relu(self.norm_1(dx, planes), _NEGATIVE_SLOPE))
        return shortcut + dx

    def delete_spade(self) -> None:
        """Replaces the SPADE layers by the identity; the activations that follow them remain."""
        self.norm_0, self.norm_1 = _Deleted(), _Deleted()
        if self.conv_s is not None:
            self.norm_s = _Deleted()


class StockGenerator(nn.Module):
    """Stock version of a SPADEGenerator with num_upsampling_layers "normal" and without VAE.

    It has the modules and state_dict keys of that generator until `become` changes them.

    Args:
        semantic_nc: condition channels.
        ngf: width, the channels before the last convolution.
        start_size: (h, w) of the first feature map, 1/32 of the image.
    """

    def __init__(self, semantic_nc: int, ngf: int, start_size: tuple[int, int]):
        super().__init__()
        self.start_size = start_size
        self.memory_format, self.needs_whole_mask = torch.contiguous_format, True
        self.fc = nn.Conv2d(semantic_nc, 16 * ngf, 3, padding=1)
        widths = {"head_0": 16, "G_middle_0": 16, "G_middle_1": 16, "up_0": 8, "up_1": 4, "up_2": 2, "up_3": 1}
        fin = 16 * ngf
        for name, width in widths.items():
            self.add_module(name, StockBlock(fin, width * ngf, semantic_nc))
            fin = width * ngf
        self.conv_img = nn.Conv2d(ngf, 3, 3, padding=1)

    @property
    def blocks(self) -> list[StockBlock]:
        return [module for module in self.children() if isinstance(module, StockBlock)]

    def forward(self, mask: LabelMap, z: None = None) -> Tensor:
        """Returns images (N, 3, H, W) in [-1, 1]. The time of this call includes building the one-hot planes."""
        return self.paint(self.planes(mask, self.fc.weight.dtype))

    def planes(self, mask: LabelMap, dtype: torch.dtype) -> Tensor:
        """Returns the one-hot planes for `paint`, (N, semantic_nc, H, W); without SPADE layers, at `start_size`."""
        return one_hot(mask, None if self.needs_whole_mask else self.start_size, dtype, self.memory_format)

    def paint(self, planes: Tensor) -> Tensor:
        """Does `forward` from one-hot planes on. Unlike `forward`, it can be compiled without graph breaks."""
        head, middle_0, *others = self.blocks
        x = self.fc(F.interpolate(planes, size=self.start_size, mode="nearest"))
        x = middle_0(_double(head(x, planes)), planes)
        # The second middle block does not upsample.
        x = others[0](x, planes)
        for block in others[1:]:
            x = block(_double(x), planes)
        return self.conv_img(F.leaky_relu(x, _NEGATIVE_SLOPE)).tanh()

    def become(self, variant: Variant) -> StockGenerator:
        """Changes the network in place into a variant for its present mode (train or eval), and returns it.

        "eager" is the network as the paper describes it: NCHW, separate convolutions for gamma and beta, and spectral
        norm computed in every forward. The other variants are channels-last, and in eval mode spectral norm is folded
        into their weights. "tuned" has one convolution for gamma and beta; "spade-free" has no SPADE layers.
        """
        if variant == "eager":
            return self
        for block in self.blocks:
            if variant == "spade-free":
                block.delete_spade()
            for module in list(block.modules()):
                if isinstance(module, StockSPADE):
                    module.join()
                elif hasattr(module, "weight_orig") and not self.training:
                    remove_spectral_norm(module)
        self.memory_format, self.needs_whole_mask = torch.channels_last, variant != "spade-free"
        return self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def stock_generator(generator: SPADEGenerator, variant: Variant, *, training: bool) -> StockGenerator:
    """Returns a stock copy of a generator with norm_G "spectralspadesyncbatch3x3", as the given variant."""
    weight = generator.conv_img.weight
    stock = StockGenerator(generator.semantic_nc, generator.conv_img.in_channels, generator.start_size)
    stock.to(weight.dtype).load_state_dict(generator.state_dict())
    return stock.train(training).become(variant)


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")
