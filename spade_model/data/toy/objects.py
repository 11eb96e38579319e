"""The objects of a toy landscape: trees and buildings, each with its own instance id."""

from __future__ import annotations

import numpy as np

from spade_model.data.toy.canvas import Canvas, noise
from spade_model.data.toy.classes import BUILDINGS, TREES
from spade_model.data.toy.palette import Palette

_LEAF_LIGHT = np.asarray((0.8, 1.0, 0.7), dtype=np.float32)


def paint_tree(
    canvas: Canvas, palette: Palette, random: np.random.Generator, x: float, foot: float, size: float
) -> None:
    """Paints a tree of height `size` with its foot at (x, foot): a conifer, or a round crown on a trunk."""
    region = canvas.region(x - size, foot - size, x + size, foot)
    columns, rows = canvas.x[:, region[1]], canvas.y[region[0]]
    if not columns.size or not rows.size:
        return
    across = (columns - x) / size
    up = (foot - rows) / size
    if random.random() < 0.45:
        crown, light = _conifer(across, up, random)
    else:
        crown, light = _round_crown(across, up, random)
    trunk = (np.abs(across) < 0.055) & (up >= 0) & (up < 0.5) & ~crown
    leaves = noise(random, rows.size, columns.size, 9, 9) - 0.5
    shade = (16 * light + 30 * leaves)[..., None] * _LEAF_LIGHT
    tint = random.normal(0, 5, 3).astype(np.float32)
    canvas.paint(TREES, crown | trunk, palette.crown + tint + shade, region)
    canvas.retouch(trunk, palette.trunk, region)


def _conifer(across: np.ndarray, up: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mask and the shading (-1..1) of a triangular crown of tiers."""
    tiers = random.integers(2, 5)
    width = random.uniform(0.24, 0.34)
    within_tier = (1 - up) * tiers % 1
    outline = width * (0.75 * (1 - up) + 0.28 * within_tier)
    crown = (np.abs(across) <= outline) & (up > 0.12) & (up <= 1)
    return crown, np.clip(across / (outline + 0.05), -1, 1) - 0.4 * within_tier


def _round_crown(across: np.ndarray, up: np.ndarray, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Returns the mask and the shading (-1..1) of a crown of overlapping discs."""
    crown = np.zeros(np.broadcast_shapes(across.shape, up.shape), dtype=bool)
    light = np.full(crown.shape, -1, dtype=np.float32)
    for _ in range(4):
        centre_x, centre_y = random.uniform(-0.16, 0.16), random.uniform(0.58, 0.74)
        radius = random.uniform(0.2, 0.27)
        distance = ((across - centre_x) ** 2 + (up - centre_y) ** 2) / radius**2
        crown |= distance <= 1
        light = np.maximum(light, 1 - 1.6 * ((across - centre_x - 0.08) ** 2 + (up - centre_y - 0.09) ** 2) / radius**2)
    return crown, np.clip(light, -1, 1)


def paint_building(
    canvas: Canvas, palette: Palette, random: np.random.Generator, x: float, foot: float, size: float
) -> None:
    """Paints a building about `size` high around x: a house with a gable roof, or a tower with a flat one."""
    is_house = random.random() < 0.5
    walls = size * random.uniform(0.45, 0.65) if is_house else size * random.uniform(0.9, 1.5)
    half_width = size * (random.uniform(0.4, 0.6) if is_house else random.uniform(0.22, 0.36))
    roof = size * random.uniform(0.3, 0.45) if is_house else 0.06 * size
    eaves = 1.15 * half_width
    region = canvas.region(x - eaves, foot - walls - roof, x + eaves, foot)
    columns, rows = canvas.x[:, region[1]] - x, foot - canvas.y[region[0]]
    if not columns.size or not rows.size:
        return
    is_wall = (np.abs(columns) <= half_width) & (rows >= 0) & (rows <= walls)
    climb = (rows - walls) / roof
    slant = 1 - climb if is_house else np.ones_like(climb)
    is_roof = (climb > 0) & (climb <= 1) & (np.abs(columns) <= eaves * slant)
    # The right part of the walls is turned away from the light.
    tint = random.normal(0, 8)
    wall = palette.wall + tint - np.where(columns > 0.45 * half_width, 22, 0)[..., None]
    canvas.paint(BUILDINGS, is_wall | is_roof, wall.astype(np.float32), region)
    canvas.retouch(is_roof, palette.roof + np.float32(tint), region)
    canvas.retouch(is_wall & _windows(columns, rows, half_width, walls, random), palette.window, region)


def _windows(
    columns: np.ndarray, rows: np.ndarray, half_width: float, walls: float, random: np.random.Generator
) -> np.ndarray:
    """Returns the mask of a grid of windows over the walls."""
    across = max(2, round(2 * half_width / 0.045))
    storeys = max(1, round(walls / 0.055))
    column_phase = (columns + half_width) / (2 * half_width) * across % 1
    storey_phase = rows / walls * storeys % 1
    width = random.uniform(0.2, 0.28)
    return (np.abs(column_phase - 0.5) < width) & (np.abs(storey_phase - 0.55) < 0.25)
