"""The canvas of the toy landscapes, and the noise that they are painted with."""

from __future__ import annotations

import numpy as np

Region = tuple[slice, slice]
"""Rows and columns of the canvas."""


class Canvas:
    """An image with the label and the instance id of every pixel, painted from back to front.

    Lengths are in units of the image height: x runs from 0 to `aspect`, y from 0 (top) to 1.
    """

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        self.aspect = width / height
        self.colour = np.zeros((height, width, 3), dtype=np.float32)
        self.labels = np.zeros((height, width), dtype=np.uint8)
        self.instances = np.zeros((height, width), dtype=np.int32)
        self.x = ((np.arange(width, dtype=np.float32) + 0.5) / height)[None, :]
        """(1, width), centres of the pixel columns."""
        self.y = ((np.arange(height, dtype=np.float32) + 0.5) / height)[:, None]
        """(height, 1), centres of the pixel rows."""
        self._instance_count = 0

    def region(self, left: float, top: float, right: float, bottom: float) -> Region:
        """Returns the region of the pixels that a box can touch; it is empty when the box is outside the image."""
        rows = slice(self._clip(top, self.height), self._clip(bottom, self.height, 1))
        return rows, slice(self._clip(left, self.width), self._clip(right, self.width, 1))

    def _clip(self, position: float, size: int, extra: int = 0) -> int:
        return min(max(int(position * self.height) + extra, 0), size)

    def paint(self, label: int, mask: np.ndarray, colour: np.ndarray, region: Region) -> None:
        """Covers the pixels of `mask` in the region with a new instance of a class.

        Args:
            mask: bool, the region's shape.
            colour: float32 RGB, broadcast to the region's shape and three channels.
        """
        self._instance_count += 1
        self.labels[region][mask] = label
        self.instances[region][mask] = self._instance_count
        self.retouch(mask, colour, region)

    def retouch(self, mask: np.ndarray, colour: np.ndarray, region: Region) -> None:
        """Changes the colours of the pixels of `mask`, but not their labels and instances."""
        target = self.colour[region]
        np.copyto(target, colour, where=mask[..., None])


def noise(random: np.random.Generator, height: int, width: int, rows: int, columns: int) -> np.ndarray:
    """Returns smooth noise, float32 (height, width) in 0..1, with about rows x columns bumps."""
    grid = random.random((rows + 1, columns + 1), dtype=np.float32)
    top, down = _lattice(height, rows)
    left, across = _lattice(width, columns)
    upper, lower = grid[top], grid[top + 1]
    blended = upper + (lower - upper) * down[:, None]
    start, end = blended[:, left], blended[:, left + 1]
    return start + (end - start) * across


def profile(random: np.random.Generator, width: int, bumps: int, octaves: int = 4) -> np.ndarray:
    """Returns a rough line, float32 (width,) in about -1..1: the sum of noise with `bumps` bumps and finer octaves."""
    line = np.zeros(width, dtype=np.float32)
    for octave in range(octaves):
        line += (noise(random, 1, width, 1, bumps << octave)[0] - 0.5) * 0.5**octave
    return line


def blend(first: np.ndarray, second: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Interpolates two colours (..., 3) with weights (...): 0 gives the first colour, 1 the second."""
    return first + (second - first) * weight[..., None]


def _lattice(size: int, cells: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns each pixel's cell, int64 (size,), and its smoothstep position in the cell, float32 (size,) in 0..1."""
    position = (np.arange(size, dtype=np.float32) + np.float32(0.5)) * np.float32(cells / size)
    cell = np.minimum(position.astype(np.int64), cells - 1)
    offset = position - cell.astype(np.float32)
    return cell, offset * offset * (3 - 2 * offset)
