"""The SPADE layer in someone else's network: same weights, same numbers, label maps instead of one-hot planes.

python examples/drop_in.py
"""

from __future__ import annotations

import torch
from torch import nn

import spade_kernels as sk


class Decoder(nn.Module):
    """Two SPADE layers, as a network that imports the original's layer would have them."""

    def __init__(self, label_nc: int):
        super().__init__()
        self.norm_0 = sk.SPADE("spadeinstance3x3", 32, label_nc)
        self.norm_1 = sk.SPADE("spadeinstance3x3", 32, label_nc)
        self.conv = nn.Conv2d(32, 32, 3, padding=1)

    def forward(self, x, segmap):
        x = self.conv(nn.functional.leaky_relu(self.norm_0(x, segmap), 0.2))
        return self.norm_1(x, segmap)


def hills(size: int) -> torch.Tensor:
    """A label map (1, size, size) of 20 wavy bands and a disc, of regions as a photograph has them."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    bands = (y + 8 * torch.sin(x / 12)).div(size / 19).clamp(0, 18).long()
    disc = (y - size // 3).square() + (x - size // 2).square() < (size // 8) ** 2
    return bands.masked_fill(disc, 19).unsqueeze(0)


def main() -> None:
    torch.manual_seed(0)
    labels = hills(128)
    label_map = sk.LabelMap(labels, 20, sk.instance_edges(labels))
    decoder, x = Decoder(label_map.channels), torch.randn(1, 32, 128, 128)

    with torch.no_grad():
        from_labels = decoder(x, label_map)
        from_planes = decoder(x, label_map.one_hot())
    index = label_map.window_index((128, 128), 3)
    print(f"largest difference      {(from_labels - from_planes).abs().max():.1e}")
    print(f"distinct 5x5 windows    {len(index.modulation)} of {128 * 128} pixels")


if __name__ == "__main__":
    main()
