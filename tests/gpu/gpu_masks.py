"""Masks for a small generator."""

from __future__ import annotations

from spade_kernels import LabelMap
from spade_kernels.testing import random_label_map
from spade_model.networks import SPADEGenerator

CLASSES, SIZE = 12, 64


def indexed_mask(kind: str, generator: SPADEGenerator, count: int = 2) -> LabelMap:
    """On the default device, with all the indexes that the generator's forward and backward need."""
    label_map = random_label_map(kind, (count, SIZE, SIZE), CLASSES, edges=True)
    return label_map.prepare(generator.resolutions())
