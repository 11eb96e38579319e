"""Composes a toy landscape: places its parts and paints them from back to front."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from spade_model.data.seeding import TOY_IMAGE, random_stream
from spade_model.data.toy.canvas import Canvas, noise, profile
from spade_model.data.toy.objects import paint_building, paint_tree
from spade_model.data.toy.palette import Palette, draw_palette
from spade_model.data.toy.scenery import paint_field, paint_mountains, paint_sea, paint_sky, paint_sun

SMALLEST_SIDE = 32
"""Smallest height and width, in pixels, at which the objects of a landscape can be recognised."""

_SPLIT_NUMBERS = {"train": 0, "val": 1}


@dataclass(frozen=True)
class ToyImage:
    """A landscape with its labels and instances."""

    labels: np.ndarray
    """uint8 (H, W), positions in TOY_CLASSES."""
    instances: np.ndarray
    """int32 (H, W), ids from 1; every tree, building, mountain and other area has its own id."""
    image: np.ndarray
    """uint8 (H, W, 3), RGB."""


def draw_toy(seed: int, split: str, index: int, height: int, width: int) -> ToyImage:
    """Draws landscape number `index` of a split ("train" or "val"); equal arguments give equal pixels.

    Raises ValueError for another split and for sides below SMALLEST_SIDE pixels.
    """
    if split not in _SPLIT_NUMBERS or min(height, width) < SMALLEST_SIDE:
        raise ValueError(f"no toy landscape for split {split!r}, {width}x{height} pixels")
    random = random_stream(seed, TOY_IMAGE, _SPLIT_NUMBERS[split], index)
    palette = draw_palette(random)
    canvas = Canvas(height, width)
    horizon = random.uniform(0.36, 0.6)
    paint_sky(canvas, palette, random, horizon)
    sun_x = paint_sun(canvas, palette, random, horizon)
    if random.random() < 0.85:
        paint_mountains(canvas, palette, random, horizon)
    has_sea = random.random() < 0.75
    if has_sea:
        paint_sea(canvas, palette, random, horizon, sun_x)
    edge = _land_edge(canvas, random, horizon, has_sea)
    paint_field(canvas, palette, random, edge, horizon)
    _paint_objects(canvas, palette, random, edge, horizon)
    grain = 10 * (noise(random, height, width, height // 2, width // 2) - 0.5)
    image = np.clip((canvas.colour + grain[..., None]) * palette.light, 0, 255)
    return ToyImage(canvas.labels, canvas.instances, image.astype(np.uint8))


def _land_edge(canvas: Canvas, random: np.random.Generator, horizon: float, has_sea: bool) -> np.ndarray:
    """Returns for each column the y at which the land begins: the hills of an inland view, or a coast."""
    line = profile(random, canvas.width, 3, octaves=3)
    if not has_sea:
        return horizon + 0.03 * line
    across = canvas.x[0] / canvas.aspect - 0.5
    coast = horizon + (1 - horizon) * random.uniform(0.3, 0.65) + random.uniform(-0.45, 0.45) * across + 0.12 * line
    return np.maximum(coast, horizon)


def _paint_objects(
    canvas: Canvas, palette: Palette, random: np.random.Generator, edge: np.ndarray, horizon: float
) -> None:
    """Paints buildings and trees on the land; distant ones are painted first and are smaller."""
    placed = []
    village_x = random.uniform(0, canvas.aspect)
    for _ in range(int(random.integers(0, 7))):
        x = float(np.clip(random.normal(village_x, 0.25), 0, canvas.aspect))
        placed.append((_foot(canvas, random, x, edge, reach=0.35), x, paint_building))
    for _ in range(int(random.integers(2, 12))):
        x = random.uniform(0, canvas.aspect)
        placed.append((_foot(canvas, random, x, edge, reach=0.9), x, paint_tree))
    for foot, x, paint in sorted(placed, key=lambda thing: thing[:2]):
        size = random.uniform(0.8, 1.25) * (0.11 + 0.28 * (foot - horizon))
        paint(canvas, palette, random, x, foot, size)


def _foot(canvas: Canvas, random: np.random.Generator, x: float, edge: np.ndarray, reach: float) -> float:
    """Draws a y on the land at x; `reach` (0..1) limits how near to the viewer it can be."""
    top = float(edge[min(int(x * canvas.height), canvas.width - 1)])
    return top + 0.02 + random.uniform(0, reach) * max(0.0, 1 - top)
