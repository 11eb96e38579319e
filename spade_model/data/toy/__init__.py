"""Procedural landscapes with labels and instances: a data set that needs no files."""

from spade_model.data.toy.classes import TOY_CLASSES
from spade_model.data.toy.scene import SMALLEST_SIDE, ToyImage, draw_toy

__all__ = ["SMALLEST_SIDE", "TOY_CLASSES", "ToyImage", "draw_toy"]
