"""Replaces the SPADE layers of an existing network: weights and results stay, label maps replace one-hot planes.

python examples/drop_in.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import spade_kernels as sk


class PlainSPADE(nn.Module):
    """The paper's SPADE layer in plain PyTorch, on one-hot planes."""

    def __init__(self, norm_nc: int, label_nc: int):
        super().__init__()
        self.param_free_norm = nn.InstanceNorm2d(norm_nc)
        self.mlp_shared = nn.Sequential(nn.Conv2d(label_nc, 128, 3, padding=1), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(128, norm_nc, 3, padding=1)
        self.mlp_beta = nn.Conv2d(128, norm_nc, 3, padding=1)

    def forward(self, x, segmap):
        hidden = self.mlp_shared(F.interpolate(segmap, size=x.shape[2:], mode="nearest"))
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class Decoder(nn.Module):
    """Two SPADE layers, made by `layer(channels)`."""

    def __init__(self, layer):
        super().__init__()
        self.norm_0 = layer(32)
        self.norm_1 = layer(32)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, segmap):
        x = self.conv(F.leaky_relu(self.norm_0(x, segmap), 0.2))
        return self.norm_1(x, segmap)


def hills(size: int) -> torch.Tensor:
    """Returns a label map (1, size, size) of 19 wavy bands and a disc: large regions, as in photographs."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    bands = (y + 8 * torch.sin(x / 12)).div(size / 19).clamp(0, 18).long()
    disc = (y - size // 3).square() + (x - size // 2).square() < (size // 8) ** 2
    return bands.masked_fill(disc, 19).unsqueeze(0)


def main() -> None:
    torch.manual_seed(0)
    labels, x = hills(128), torch.randn(1, 32, 128, 128)
    edges = sk.instance_edges(labels)
    planes = torch.cat((F.one_hot(labels, 20).permute(0, 3, 1, 2), edges.unsqueeze(1)), dim=1).float()
    label_map = sk.LabelMap(labels, 20, edges)

    before = Decoder(lambda channels: PlainSPADE(channels, 21))
    after = Decoder(lambda channels: sk.SPADE("spadeinstance3x3", channels, 21))
    after.load_state_dict(before.state_dict())
    with torch.no_grad():
        difference = (before(x, planes) - after(x, label_map)).abs().max()
    index = label_map.window_index((128, 128), 3)
    print(f"largest difference      {difference:.1e}")
    print(f"distinct 5x5 windows    {len(index.modulation)} of {128 * 128} pixels")


if __name__ == "__main__":
    main()
