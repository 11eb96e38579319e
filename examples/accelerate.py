"""One line makes the SPADE layers of your model fast: NVlabs style, LivePortrait style, a diffusion U-Net's layers.

python examples/accelerate.py [original|portrait|diffusion]
"""

from __future__ import annotations

import copy
import sys

import torch
import torch.nn.functional as F
from torch import nn

import spade_kernels as sk


class SPADE(nn.Module):
    """The layer as most repositories have it."""

    def __init__(self, norm, norm_nc, label_nc):
        super().__init__()
        self.param_free_norm = norm
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, 128, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(128, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(128, norm_nc, 3, padding=1)

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class ResnetBlock(nn.Module):
    """The residual block of NVlabs/SPADE, OASIS and LivePortrait."""

    def __init__(self, norm, fin, fout, label_nc):
        super().__init__()
        self.conv_0 = nn.utils.spectral_norm(nn.Conv2d(fin, fout, 3, padding=1))
        self.conv_1 = nn.utils.spectral_norm(nn.Conv2d(fout, fout, 3, padding=1))
        self.conv_s = nn.utils.spectral_norm(nn.Conv2d(fin, fout, 1, bias=False))
        self.norm_0, self.norm_1 = SPADE(norm(fin), fin, label_nc), SPADE(norm(fout), fout, label_nc)
        self.norm_s = SPADE(norm(fin), fin, label_nc)

    def forward(self, x, seg):
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), 0.2))
        return self.conv_s(self.norm_s(x, seg)) + self.conv_1(F.leaky_relu(self.norm_1(dx, seg), 0.2))


def bands(size):
    """One-hot planes (1, 20, size, size) of wavy bands."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    labels = (y + 8 * torch.sin(x / 12)).div(size / 19).clamp(0, 19).long()
    return F.one_hot(labels, 20).permute(2, 0, 1).unsqueeze(0).float()


def original():
    """A block between two sizes, for a one-hot mask."""
    block = ResnetBlock(lambda channels: nn.BatchNorm2d(channels, affine=False), 64, 32, 20)
    return block, (torch.randn(1, 64, 64, 64), bands(128))


def portrait():
    """The condition is a feature map of lower resolution, as LivePortrait, SadTalker and DaGAN have it."""
    return ResnetBlock(nn.InstanceNorm2d, 64, 32, 24), (torch.randn(1, 64, 64, 64), torch.randn(1, 24, 32, 32))


def diffusion():
    """A layer of a diffusion U-Net. Once frozen, it keeps its table for the mask that a sampler repeats."""
    return SPADE(nn.GroupNorm(32, 64, affine=False), 64, 20), (torch.randn(1, 64, 64, 64), bands(128))


def main(names: list[str]) -> None:
    for name in names or ["original", "portrait", "diffusion"]:
        torch.manual_seed(0)
        model, inputs = {"original": original, "portrait": portrait, "diffusion": diffusion}[name]()
        stock = copy.deepcopy(model)

        report = sk.accelerate(model)

        print(f"{name}\n{report}")
        with torch.no_grad():
            expected = stock.eval()(*inputs)
            error = (model.eval()(*inputs) - expected).abs().max() / expected.abs().max()
            sk.freeze(model)  # for inference: packed weights
            frozen = (model(*inputs) - expected).abs().max() / expected.abs().max()
        print(f"largest difference  {error.item():.1e}, frozen {frozen.item():.1e}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
