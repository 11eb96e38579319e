"""Models with the structure of other repositories' models, rewritten from their attribute names, formulas and sizes."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

HIDDEN = 128


class Layer(nn.Module):
    """SPADE layer as in NVlabs/SPADE, OASIS, LivePortrait and semantic-diffusion-model.

    Args:
        norm: normalization without parameters. norm_name: attribute that holds it; OASIS has `first_norm`.
    """

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
    """Residual block of NVlabs/SPADE, OASIS and LivePortrait, with spectral norm."""

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
    """The generator of NVlabs/SPADE; with `noise`, that of OASIS.

    Args:
        condition_channels: number of label channels.
        ngf: width, the channels before the last convolution.
        noise: length of the random vector that OASIS draws for each image and puts before the label channels.
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
        """Maps one-hot planes (N, condition_channels, H, W) to images (N, 3, H, W)."""
        if self.noise:
            noise = torch.randn(len(segmap), self.noise, 1, 1, dtype=segmap.dtype)
            segmap = torch.cat((noise.expand(-1, -1, *segmap.shape[2:]), segmap), 1)
        x = self.fc(F.interpolate(segmap, tuple(side // 32 for side in segmap.shape[2:])))
        for i, block in enumerate(self.body):
            x = F.interpolate(x, scale_factor=2) if i in self.doubled else x
            x = block(x, segmap)
        return torch.tanh(self.conv_img(F.leaky_relu(x, 0.2)))


class Decoder(nn.Module):
    """The decoder of LivePortrait, with instance norms; the input feature map is also the condition of all layers."""

    def __init__(self, channels: int = 256, out: int = 64):
        super().__init__()
        self.fc = nn.Conv2d(channels, 2 * channels, 3, padding=1)
        widths = [2 * channels] * 7 + [channels, out]
        self.body = nn.ModuleList(
            Block(fin, fout, channels, nn.InstanceNorm2d, "param_free_norm") for fin, fout in pairwise(widths)
        )
        self.conv_img = nn.Sequential(nn.Conv2d(out, 12, 3, padding=1), nn.PixelShuffle(2))

    def forward(self, feature: Tensor) -> Tensor:
        """Maps features (N, channels, h, w) to images (N, 3, 8 * h, 8 * w)."""
        x = self.fc(feature)
        for i, block in enumerate(self.body):
            x = F.interpolate(x, scale_factor=2) if i >= 6 else x
            x = block(x, feature)
        return torch.sigmoid(self.conv_img(F.leaky_relu(x, 0.2)))


class DiffusionLayers(nn.Module):
    """The SPADE layers of semantic-diffusion-model's U-Net, without its other layers.

    Args:
        condition_channels: number of mask channels.
        width: channels of the U-Net's first level.
        sizes: height and width of the feature maps of each level; the default is that of 256 x 256 images.
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
    """The SPADE layer of MONAI, with a leaky ReLU, 64 hidden channels, and instance norms of gamma and beta."""

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
