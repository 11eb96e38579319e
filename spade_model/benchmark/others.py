"""Stand-ins for other people's models, written from their public behaviour: attribute names, formulas and sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

HIDDEN = 128


class Layer(nn.Module):
    """SPADE as in NVlabs/SPADE, OASIS (its norm is `first_norm`), LivePortrait and, with a group norm, diffusion."""

    def __init__(self, norm: nn.Module, channels: int, condition_channels: int, norm_name: str = "param_free_norm"):
        super().__init__()
        self.norm_name = norm_name
        self.add_module(norm_name, norm)
        self.mlp_shared = nn.Sequential(nn.Conv2d(condition_channels, HIDDEN, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(HIDDEN, channels, 3, padding=1)
        self.mlp_beta = nn.Conv2d(HIDDEN, channels, 3, padding=1)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        normalized = getattr(self, self.norm_name)(x)
        hidden = self.mlp_shared(F.interpolate(segmap, x.shape[2:]))
        return normalized * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class Block(nn.Module):
    """The residual block around them."""

    def __init__(self, fin: int, fout: int, condition_channels: int, norm: type[nn.Module], norm_name: str):
        super().__init__()
        middle = min(fin, fout)

        def layer(channels: int) -> Layer:
            return Layer(norm(channels, affine=False), channels, condition_channels, norm_name)

        self.conv_0 = spectral_norm(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = spectral_norm(nn.Conv2d(middle, fout, 3, padding=1))
        self.norm_0, self.norm_1 = layer(fin), layer(middle)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = spectral_norm(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = layer(fin)

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(dx, seg), 0.2))


class Generator(nn.Module):
    """NVlabs/SPADE's generator, and OASIS's with `noise` planes before the labels.

    Args:
        condition_channels: without noise. ngf: width. noise: channels of a noise vector of each image; 0 for none.
    """

    def __init__(self, condition_channels: int, ngf: int = 64, noise: int = 0):
        super().__init__()
        self.noise, channels = noise, noise + condition_channels
        widths = [16, 16, 16, 8, 4, 2, 1] if noise else [16, 16, 16, 16, 8, 4, 2, 1]
        self.doubled = range(1, 6) if noise else (1, 3, 4, 5, 6)
        name = "first_norm" if noise else "param_free_norm"
        self.fc = nn.Conv2d(channels, 16 * ngf, 3, padding=1)
        self.body = nn.ModuleList(
            Block(fin * ngf, fout * ngf, channels, nn.BatchNorm2d, name) for fin, fout in pairwise(widths)
        )
        self.conv_img = nn.Conv2d(ngf, 3, 3, padding=1)

    def forward(self, segmap: Tensor) -> Tensor:
        """(N, condition_channels, H, W) one-hot planes -> (N, 3, H, W)."""
        if self.noise:
            noise = torch.randn(len(segmap), self.noise, 1, 1, dtype=segmap.dtype)
            segmap = torch.cat((noise.expand(-1, -1, *segmap.shape[2:]), segmap), 1)
        x = self.fc(F.interpolate(segmap, tuple(side // 32 for side in segmap.shape[2:])))
        for i, block in enumerate(self.body):
            x = F.interpolate(x, scale_factor=2) if i in self.doubled else x
            x = block(x, segmap)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class Decoder(nn.Module):
    """LivePortrait's decoder: instance norms, and a feature map (N, channels, h, w) as the condition of all layers."""

    def __init__(self, channels: int = 256, out: int = 64):
        super().__init__()
        self.fc = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        widths = [2 * channels] * 7 + [channels, out]
        self.body = nn.ModuleList(
            Block(fin, fout, channels, nn.InstanceNorm2d, "param_free_norm") for fin, fout in pairwise(widths)
        )
        self.conv_img = nn.Sequential(nn.Conv2d(out, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, feature: Tensor) -> Tensor:
        """(N, channels, h, w) -> (N, 3, 8 * h, 8 * w)."""
        x = self.fc(feature)
        for i, block in enumerate(self.body):
            x = F.interpolate(x, scale_factor=2) if i >= 6 else x
            x = block(x, feature)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, 0.2)))


class DiffusionLayers(nn.Module):
    """The SPADE layers of semantic-diffusion-model's U-Net alone, in the order of one pass at 256 x 256.

    Args:
        condition_channels: of the mask. width: of the U-Net's first level.
    """

    def __init__(self, condition_channels: int, width: int = 256, sizes: tuple[int, ...] = (64, 32, 16, 8)):
        super().__init__()
        widths = (width, 2 * width, 2 * width, 4 * width)
        self.shapes = [(c, size) for c, size in zip(widths, sizes, strict=True) for _ in range(4)]
        self.layers = nn.ModuleList(
            Layer(nn.GroupNorm(32, c, affine=False), c, condition_channels, "norm") for c, _ in self.shapes
        )

    def inputs(self) -> list[Tensor]:
        return [torch.randn(1, c, size, size) for c, size in self.shapes]

    def forward(self, inputs: list[Tensor], mask: Tensor) -> list[Tensor]:
        return [layer(x, mask) for layer, x in zip(self.layers, inputs, strict=True)]


class NormedLayer(nn.Module):
    """MONAI's layer: a leaky ReLU, 64 hidden channels, and instance norms of gamma and beta."""

    def __init__(self, channels: int, condition_channels: int, hidden: int = 64):
        super().__init__()

        def normed(conv: nn.Module) -> nn.Sequential:
            return nn.Sequential(conv, nn.Sequential(nn.InstanceNorm2d(channels)))

        self.param_free_norm = nn.InstanceNorm2d(channels)
        self.mlp_shared = nn.Sequential(nn.Conv2d(condition_channels, hidden, 3, padding=1), nn.LeakyReLU())
        self.mlp_gamma = normed(nn.Conv2d(hidden, channels, 3, padding=1))
        self.mlp_beta = normed(nn.Conv2d(hidden, channels, 3, padding=1))

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        hidden = self.mlp_shared(F.interpolate(segmap, x.shape[2:]))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)
