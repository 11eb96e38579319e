"""The shapes of the generator's feature maps and SPADE layers."""

from __future__ import annotations

from spade_kernels import LabelMap


def resolutions(mask: LabelMap) -> list[tuple[int, int]]:
    """Returns (h, w) of the generator's feature maps, from 1/32 of the mask's size to its full size."""
    height, width = mask.shape[1:]
    return [(height // step, width // step) for step in (32, 16, 8, 4, 2, 1)]


def layer_shapes(ngf: int, size: int) -> dict[tuple[int, int, int], int]:
    """Returns how many of the 18 SPADE layers have each (channels, side of the output, upsample), for square images."""
    found = {(16 * ngf, size // 32, 1): 2, (16 * ngf, size // 16, 2): 1, (16 * ngf, size // 16, 1): 3}
    for width, step in ((16, 8), (8, 4), (4, 2), (2, 1)):
        # norm_0 and norm_s normalize the block's input; norm_1 normalizes half as many channels.
        found |= {(width * ngf, size // step, 2): 2, (width * ngf // 2, size // step, 1): 1}
    return found


def input_shapes(ngf: int, size: int) -> dict[tuple[int, int], int]:
    """Returns how many of the 18 SPADE layers have each (channels, side), with inputs that are already upsampled."""
    found: dict[tuple[int, int], int] = {}
    for (channels, side, _), count in layer_shapes(ngf, size).items():
        found[channels, side] = found.get((channels, side), 0) + count
    return found
