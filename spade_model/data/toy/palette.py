"""The colours of the toy landscapes: each image has a palette, drawn from a time of day and a season."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

Colour = np.ndarray
"""float32 (3,), RGB in 0..255."""


@dataclass(frozen=True)
class Palette:
    """The colours of one image. They differ enough between classes that a pixel's colour identifies its class."""

    sky_top: Colour
    sky_horizon: Colour
    cloud: Colour
    sun: Colour
    sea_far: Colour
    sea_near: Colour
    mountain_far: Colour
    mountain_near: Colour
    field_light: Colour
    field_dark: Colour
    crown: Colour
    trunk: Colour
    wall: Colour
    roof: Colour
    window: Colour
    light: Colour
    """Factor by which all colours of the image are multiplied."""


# Day, golden hour, dusk.
_SKY_TOP = ((92, 158, 228), (112, 162, 216), (116, 136, 206))
_SKY_HORIZON = ((198, 224, 243), (240, 218, 200), (236, 190, 190))
_CLOUD = ((246, 249, 252), (252, 234, 222), (244, 206, 208))
_SUN = ((255, 240, 130), (255, 222, 104), (255, 196, 84))
_WINDOW = ((64, 40, 74), (92, 40, 56), (250, 176, 116))
_LIGHT = ((1.0, 1.0, 1.0), (1.04, 0.99, 0.92), (0.93, 0.9, 0.98))

# Spring, summer, autumn.
_FIELD_LIGHT = ((168, 204, 84), (206, 200, 84), (222, 186, 82))
_FIELD_DARK = ((140, 180, 66), (178, 172, 64), (192, 156, 62))
_CROWN = ((44, 112, 48), (30, 94, 44), (62, 98, 34))


def draw_palette(random: np.random.Generator) -> Palette:
    """Draws a palette between the times of day and seasons above."""
    hour = random.choice(3, p=(0.5, 0.3, 0.2)) + random.uniform(-0.3, 0.3)
    season = random.uniform(0, 2)

    def near(colour: tuple[int, int, int], spread: float = 7) -> Colour:
        return np.asarray(colour + random.normal(0, spread, 3), dtype=np.float32)

    return Palette(
        sky_top=_between(_SKY_TOP, hour),
        sky_horizon=_between(_SKY_HORIZON, hour),
        cloud=_between(_CLOUD, hour),
        sun=_between(_SUN, hour),
        sea_far=near((44, 104, 166)),
        sea_near=near((18, 92, 132)),
        mountain_far=near((150, 140, 164)),
        mountain_near=near((112, 98, 116)),
        field_light=_between(_FIELD_LIGHT, season),
        field_dark=_between(_FIELD_DARK, season),
        crown=_between(_CROWN, season),
        trunk=near((66, 48, 30), 4),
        wall=near((206, 108, 84)),
        roof=near((142, 52, 46)),
        window=_between(_WINDOW, hour),
        light=_between(_LIGHT, hour),
    )


def _between(colours: tuple[tuple[float, float, float], ...], position: float) -> Colour:
    """Interpolates linearly in a list of colours; beyond its ends the first or last colour is used."""
    columns = np.asarray(colours, dtype=np.float32).T
    return np.asarray([np.interp(position, range(len(colours)), column) for column in columns], dtype=np.float32)
