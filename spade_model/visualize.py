"""Converts tensors to pictures: photographs, label maps and the networks' conditions."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from PIL import Image

from spade_kernels import LabelMap

# Values of the public Cityscapes palette in the order of its label ids; the last is the licence plate, id -1.
# fmt: off
_CITYSCAPES = (
    # void
    (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (0, 0, 0), (111, 74, 0), (81, 0, 81),
    # flat
    (128, 64, 128), (244, 35, 232), (250, 170, 160), (230, 150, 140),
    # construction
    (70, 70, 70), (102, 102, 156), (190, 153, 153), (180, 165, 180), (150, 100, 100), (150, 120, 90),
    # object
    (153, 153, 153), (153, 153, 153), (250, 170, 30), (220, 220, 0),
    # nature and sky
    (107, 142, 35), (152, 251, 152), (70, 130, 180),
    # human
    (220, 20, 60), (255, 0, 0),
    # vehicle
    (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 0, 90), (0, 0, 110), (0, 80, 100), (0, 0, 230), (119, 11, 32),
    (0, 0, 142),
)
# sky, sea, mountain, field, trees, sun, buildings
_TOY = (
    (143, 196, 238), (32, 98, 158), (139, 124, 148), (178, 203, 92), (42, 108, 52), (255, 219, 92), (200, 104, 82),
)
# fmt: on
_WELL_KNOWN = {len(palette): palette for palette in (_CITYSCAPES, _TOY)}

_NO_CLASS = np.array((0, 0, 0), dtype=np.uint8)
_NOT_A_NUMBER = np.array((255, 0, 255), dtype=np.uint8)
_EDGE_BRIGHTNESS = 0.55


@lru_cache(maxsize=8)
def label_colours(num_labels: int) -> np.ndarray:
    """Returns the RGB colours of all labels, read-only uint8 (num_labels, 3), which depend only on `num_labels`.

    35 labels have the Cityscapes colours, where some classes share a colour; 7 labels have the natural colours of the
    toy landscapes. Other numbers of labels have generated colours that are as far apart as possible; beyond about two
    thousand labels, colours repeat.
    """
    palette = _WELL_KNOWN.get(num_labels)
    colours = _spread_colours(num_labels) if palette is None else np.array(palette, dtype=np.uint8)
    colours.setflags(write=False)
    return colours


def colour_labels(labels: torch.Tensor | np.ndarray, num_labels: int) -> Image.Image:
    """Draws an integer label map (H, W) as an RGB picture. Labels outside 0..num_labels-1 (no class) are black.

    Raises:
        ValueError: labels are not (H, W).
    """
    return Image.fromarray(_paint(labels, num_labels, None))


def to_image(image: torch.Tensor, bits: int = 8) -> Image.Image:
    """Converts a floating-point tensor (3, H, W) or (1, H, W), on any device, to an RGB or grey picture.

    -1 is black and 1 is full brightness; values outside are clamped. Pixels with NaN are magenta, so that they are
    visible; a grey picture with such pixels becomes RGB.

    Args:
        bits: 8, or 16 for grey pictures, which then have mode I;16 and black pixels for NaN.

    Raises:
        ValueError: the tensor is neither (3, H, W) nor (1, H, W), or has three channels with `bits` 16.
    """
    if image.dim() != 3 or image.shape[0] not in (1, 3):
        raise ValueError(f"expected an image (1, H, W) or (3, H, W), got shape {tuple(image.shape)}")
    if bits == 16 and image.shape[0] == 3:
        raise ValueError("pictures of 16 bits have one channel, got three")
    values = image.detach().float().cpu()
    broken = values.isnan().any(0).numpy()
    levels = (values.nan_to_num(nan=-1.0).clamp(-1, 1) + 1) * ((2**bits - 1) / 2)
    if bits == 16:
        return Image.fromarray(levels[0].round().numpy().astype(np.uint16))
    pixels = levels.round().to(torch.uint8).permute(1, 2, 0).numpy()
    if broken.any():
        return Image.fromarray(np.where(broken[..., None], _NOT_A_NUMBER, pixels))
    return Image.fromarray(pixels[..., 0] if len(values) == 1 else pixels)


def preview(image: Image.Image) -> Image.Image:
    """Converts a picture of mode I;16 to 8 bits, mode L."""
    # Pillow's own conversion clips at 255.
    return Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))


def condition_image(segmap: LabelMap | torch.Tensor, index: int, colours: np.ndarray | None = None) -> Image.Image:
    """Draws the condition of one image of a batch as an RGB picture.

    Args:
        segmap: a label map, drawn in the colours of its labels and darker on instance edges; or a floating-point
            condition (N, C, H, W), of which `to_image` shows the first three channels, or the first channel in grey
            if C < 3.
        index: index of the image in the batch.
        colours: uint8 (num_labels, 3), the colours of a label map's labels; by default `label_colours`.
    """
    if not isinstance(segmap, LabelMap):
        planes = segmap[index]
        return to_image(planes[:3] if len(planes) >= 3 else planes[:1].expand(3, -1, -1))
    pixels = _paint(segmap.labels[index], segmap.num_labels, colours)
    if segmap.edges is not None:
        edges = segmap.edges[index].cpu().numpy()
        pixels[edges] = pixels[edges] * _EDGE_BRIGHTNESS
    return Image.fromarray(pixels)


def overlay(image: Image.Image, labels: Image.Image, alpha: float = 0.5) -> Image.Image:
    """Blends `image` with the label picture: `alpha` 0 shows only the image, 1 only the labels.

    The labels are resized to the image's size by nearest-neighbour sampling, so that colours do not mix.
    """
    labels = labels.convert("RGB").resize(image.size, Image.Resampling.NEAREST)
    return Image.blend(image.convert("RGB"), labels, alpha)


def _paint(labels: torch.Tensor | np.ndarray, num_labels: int, chosen: np.ndarray | None) -> np.ndarray:
    ids = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if ids.ndim != 2:
        raise ValueError(f"expected labels (H, W), got shape {ids.shape}")
    colours = np.vstack((label_colours(num_labels) if chosen is None else chosen, _NO_CLASS))
    return colours[np.where((ids >= 0) & (ids < num_labels), ids, num_labels)]


def _spread_colours(count: int) -> np.ndarray:
    """Returns uint8 (count, 3), a farthest-point sample of the colours with medium lightness and chroma."""
    levels = np.arange(25, 250, 15)
    candidates = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(-1, 3)
    lab = _oklab(candidates)
    chroma = np.hypot(lab[:, 1], lab[:, 2])
    pleasant = (lab[:, 0] > 0.35) & (lab[:, 0] < 0.92) & (chroma > 0.03) & (chroma < 0.2)
    candidates, lab = candidates[pleasant], lab[pleasant]
    chosen = [int(np.argmin(np.abs(candidates - (70, 130, 180)).sum(1)))]
    distance = np.full(len(lab), np.inf)
    while len(chosen) < min(count, len(lab)):
        distance = np.minimum(distance, np.square(lab - lab[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return candidates[np.resize(chosen, count)].astype(np.uint8)


def _oklab(rgb: np.ndarray) -> np.ndarray:
    """Converts sRGB (n, 3) in 0..255 to Oklab, where Euclidean distance approximates perceived difference."""
    encoded = rgb / 255
    linear = np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    cones = np.array(
        [
            [0.4122214708, 0.5363325363, 0.0514459929],
            [0.2119034982, 0.6806995451, 0.1073969566],
            [0.0883024619, 0.2817188376, 0.6299787005],
        ]
    )
    opponents = np.array(
        [
            [0.2104542553, 0.7936177850, -0.0040720468],
            [1.9779984951, -2.4285922050, 0.4505937099],
            [0.0259040371, 0.7827717662, -0.8086757660],
        ]
    )
    return np.cbrt(linear @ cones.T) @ opponents.T
