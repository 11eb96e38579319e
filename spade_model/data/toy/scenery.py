"""The large parts of a toy landscape, from back to front: sky, sun, mountains, sea, field."""

from __future__ import annotations

import numpy as np

from spade_model.data.toy.canvas import Canvas, blend, noise, profile
from spade_model.data.toy.classes import FIELD, MOUNTAIN, SEA, SKY, SUN
from spade_model.data.toy.palette import Palette

_SUN_CORE = np.asarray((0, 8, 26), dtype=np.float32)
"""Added to the sun's colour in its centre."""
_FOAM = np.asarray((0.75, 0.95, 1.0), dtype=np.float32)


def paint_sky(canvas: Canvas, palette: Palette, random: np.random.Generator, horizon: float) -> None:
    """Paints a gradient down to the horizon, with clouds stretched sideways."""
    height, width = canvas.height, canvas.width
    depth = np.clip(canvas.y / horizon, 0, 1) ** 1.4
    colour = blend(palette.sky_top, palette.sky_horizon, np.broadcast_to(depth, (height, width)))
    columns = max(2, round(3 * canvas.aspect))
    density = 0.65 * noise(random, height, width, 7, columns) + 0.35 * noise(random, height, width, 18, 3 * columns)
    cover = random.uniform(0.48, 0.75)
    clouds = np.clip((density - cover) * 5, 0, 1) * np.clip(1.15 - canvas.y / horizon, 0, 1)
    colour = blend(colour, palette.cloud, clouds)
    canvas.paint(SKY, np.ones((height, width), dtype=bool), colour, (slice(None), slice(None)))


def paint_sun(canvas: Canvas, palette: Palette, random: np.random.Generator, horizon: float) -> float:
    """Paints a disc with a glow, near the horizon in about a third of the images. Returns the sun's x."""
    radius = random.uniform(0.075, 0.12)
    x = random.uniform(0.12, 0.88) * canvas.aspect
    low = random.random() < 0.35
    y = horizon - random.uniform(0.0, 0.09) if low else random.uniform(0.1, max(0.11, horizon - 0.16))
    everything = (slice(None), slice(None))
    distance = np.sqrt((canvas.x - x) ** 2 + (canvas.y - y) ** 2)
    glow = 0.28 * np.clip(1 - (distance - radius) / (2.2 * radius), 0, 1) ** 2
    canvas.retouch(distance > radius, blend(canvas.colour, palette.sun, glow), everything)
    shade = np.clip(distance / radius, 0, 1) ** 2
    canvas.paint(SUN, distance <= radius, blend(palette.sun + _SUN_CORE, palette.sun, shade), everything)
    return x


def paint_mountains(canvas: Canvas, palette: Palette, random: np.random.Generator, horizon: float) -> None:
    """Paints one to five mountains, distant ones first, with light on one side of their ridges."""
    count = int(random.integers(1, 6))
    light_side = random.choice((-1.0, 1.0))
    for order in range(count):
        nearness = (order + 1) / count
        centre = random.uniform(-0.05, 1.05) * canvas.aspect
        half_width = random.uniform(0.25, 0.6)
        peak = random.uniform(0.12, 0.34) * (1.15 - 0.35 * nearness) * min(1, horizon / 0.4)
        _paint_mountain(canvas, palette, random, (centre, horizon + 0.01, half_width, peak), nearness, light_side)


def _paint_mountain(
    canvas: Canvas,
    palette: Palette,
    random: np.random.Generator,
    shape: tuple[float, float, float, float],
    nearness: float,
    light_side: float,
) -> None:
    """Paints a mountain; `shape` is (x of the peak, y of the foot, half the width of the foot, height)."""
    centre, foot, half_width, peak = shape
    region = canvas.region(centre - half_width, foot - 1.3 * peak, centre + half_width, foot)
    x, y = canvas.x[:, region[1]], canvas.y[region[0]]
    if not x.size or not y.size:
        return
    negative_slope = np.clip(1 - np.abs(x - centre) / half_width, 0, 1) ** 1.15
    crest = foot - peak * negative_slope * (1 + 0.45 * profile(random, x.size, 4)[None, :])
    # The line between the lit and the shaded side wanders down from the peak.
    down = (y - (foot - peak)) / peak
    wander = 0.3 * half_width * profile(random, y.size, 3)[:, None] + 0.12 * half_width * down
    side = np.clip(light_side * (x - centre - wander) / (0.09 * half_width), -1, 1)
    roughness = noise(random, y.size, x.size, 8, 10) - 0.5
    base = blend(palette.mountain_far, palette.mountain_near, np.full((1, 1), nearness, dtype=np.float32))
    haze = np.clip(down, 0, 1) * 10 * (1 - nearness)
    shade = 15 * side + 26 * roughness + haze
    canvas.paint(MOUNTAIN, y >= crest, base + shade[..., None], region)


def paint_sea(canvas: Canvas, palette: Palette, random: np.random.Generator, horizon: float, sun_x: float) -> None:
    """Paints water below the horizon, with the sun's glitter and with waves that grow towards the viewer."""
    region = (slice(int(horizon * canvas.height), canvas.height), slice(None))
    y = canvas.y[region[0]]
    depth = (y - horizon) / (1 - horizon)
    shape = (y.size, canvas.width)
    wobble = noise(random, *shape, 10, max(3, round(5 * canvas.aspect)))
    waves = np.sin(70 * np.sqrt(np.clip(depth, 0.002, 1)) + 7 * wobble + random.uniform(0, 6))
    crests = np.clip(waves - 0.35, 0, 1) * np.clip(noise(random, *shape, 24, round(9 * canvas.aspect)) * 2 - 0.6, 0, 1)
    glitter = np.exp(-(((canvas.x - sun_x) / (0.05 + 0.12 * depth)) ** 2)) * np.clip(waves, 0, 1)
    colour = blend(palette.sea_far, palette.sea_near, np.broadcast_to(depth, shape))
    colour = colour + (44 * crests + 30 * glitter)[..., None] * _FOAM
    canvas.paint(SEA, np.ones(shape, dtype=bool), colour, region)


def paint_field(
    canvas: Canvas, palette: Palette, random: np.random.Generator, edge: np.ndarray, horizon: float
) -> None:
    """Paints land below `edge` (y for each column): one or two fields, with furrows that meet on the horizon."""
    everything = (slice(None), slice(None))
    land = canvas.y >= edge[None, :]
    border = canvas.aspect * (random.uniform(0.25, 0.75) + random.uniform(-0.4, 0.4) * (canvas.y - edge.mean()))
    parts = (land & (canvas.x < border), land & (canvas.x >= border)) if random.random() < 0.6 else (land,)
    depth = np.clip(canvas.y - horizon, 0.02, 1)
    mottle = noise(random, canvas.height, canvas.width, 14, round(14 * canvas.aspect))
    for part in parts:
        vanishing_x = random.uniform(-0.3, 1.3) * canvas.aspect
        furrows = np.sin((canvas.x - vanishing_x) / (depth + 0.12) * random.uniform(9, 16)) * np.clip(depth * 4, 0, 1)
        stripes = 0.5 + 0.35 * furrows + 0.5 * (mottle - 0.5)
        colour = blend(palette.field_dark, palette.field_light, stripes) + random.uniform(-7, 7)
        canvas.paint(FIELD, part, colour.astype(np.float32), everything)
