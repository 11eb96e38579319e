"""Resizing, cropping and flipping in the eight preprocess modes, in the same way for all images of an item."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from spade_model.config import DataConfig
from spade_model.data.images import MAX_PIXELS
from spade_model.data.problem import DataError, data_error

_SIZE_MULTIPLE = 32
"""Mode `none` rounds sides to multiples of this: the generator's smallest feature map is 1/32 of the image."""

_LARGEST_LOAD_SIZE = 2**24

Fit = Literal["pad", "crop", "stretch"]
"""How an image of other proportions is brought into a box."""


@dataclass(frozen=True)
class Geometry:
    """The size, crop and flip of all images of one item. Sizes are (width, height) in pixels, as in Pillow."""

    size: tuple[int, int]
    """Size after resizing."""
    crop: tuple[int, int, int, int] | None
    """(left, top, right, bottom) within the resized image; None for no crop."""
    flip: bool
    """Flip left to right, after the crop."""

    @property
    def result_size(self) -> tuple[int, int]:
        """(width, height) of the result."""
        if self.crop is None:
            return self.size
        left, top, right, bottom = self.crop
        return right - left, bottom - top

    def apply(self, image: Image.Image, resample: Image.Resampling) -> Image.Image:
        """Returns the resized, cropped and flipped image. Ids need NEAREST, photographs BICUBIC."""
        if image.size != self.size:
            image = image.resize(self.size, resample)
        if self.crop is not None:
            image = image.crop(self.crop)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.flip else image


def fit_into(size: tuple[int, int], box: tuple[int, int], fit: Fit) -> Geometry:
    """Returns the geometry that brings an image of `size` into a box; both are (width, height).

    With "pad" the image is scaled until it touches the box from inside, so one side can be shorter than the box's.
    With "crop" it is scaled until it fills the box, and its middle is kept. With "stretch" it takes on the box's
    proportions.
    """
    if fit == "stretch":
        return Geometry(box, None, False)
    scales = [inner / side for inner, side in zip(box, size, strict=True)]
    scale = min(scales) if fit == "pad" else max(scales)
    width, height = (max(1, round(side * scale)) for side in size)
    if fit == "pad":
        return Geometry((min(width, box[0]), min(height, box[1])), None, False)
    scaled = max(width, box[0]), max(height, box[1])
    left, top = _crop_corner(scaled[0] - box[0], scaled[1] - box[1], None)
    return Geometry(scaled, (left, top, left + box[0], top + box[1]), False)


def plan_geometry(
    size: tuple[int, int], config: DataConfig, random: np.random.Generator | None, path: Path
) -> Geometry:
    """Returns the geometry of an item whose files have `size` (width, height).

    `random` places the crop and decides the flip, for training. Without it (validation and inference) the crop is
    centred, nothing is flipped, and images are scaled to crop_size instead of load_size.
    Raises DataError, naming `path`, when the crop does not fit into the resized image, or when the resized image would
    have more than MAX_PIXELS pixels.
    """
    load_size = config.load_size if random is not None else config.crop_size
    resized = _resized(size, config, load_size)
    if resized[0] * resized[1] > MAX_PIXELS:
        what = "the image is {}x{} and would be scaled to {}x{}: too large".format(*size, *resized)
        raise data_error(path, what, "Lower --load_size and --crop_size, or remove the image")
    crop = None
    if "crop" in config.preprocess_mode:
        if not _fits(resized, config):
            raise _crop_does_not_fit(size, resized, config, path, training=random is not None)
        crop_height, crop_width = config.image_size
        left, top = _crop_corner(resized[0] - crop_width, resized[1] - crop_height, random)
        crop = (left, top, left + crop_width, top + crop_height)
    flip = random is not None and not config.no_flip and bool(random.random() < 0.5)
    return Geometry(resized, crop, flip)


def _resized(size: tuple[int, int], config: DataConfig, load_size: int) -> tuple[int, int]:
    width, height = size
    mode = config.preprocess_mode
    if mode == "resize_and_crop":
        return load_size, round(load_size / config.aspect_ratio)
    if mode.startswith("scale_width"):
        return load_size, max(1, load_size * height // width)
    if mode.startswith("scale_shortside"):
        short = min(width, height)
        return load_size * width // short, load_size * height // short
    if mode == "fixed":
        image_height, image_width = config.image_size
        return image_width, image_height
    if mode == "none":
        return _round_to_multiple(width), _round_to_multiple(height)
    return size


def _round_to_multiple(side: int) -> int:
    return max(1, round(side / _SIZE_MULTIPLE)) * _SIZE_MULTIPLE


def _crop_corner(spare_width: int, spare_height: int, random: np.random.Generator | None) -> tuple[int, int]:
    if random is None:
        return spare_width // 2, spare_height // 2
    return int(random.integers(spare_width, endpoint=True)), int(random.integers(spare_height, endpoint=True))


def _crop_does_not_fit(
    size: tuple[int, int], resized: tuple[int, int], config: DataConfig, path: Path, *, training: bool
) -> DataError:
    crop_height, crop_width = config.image_size
    scaled = f", {resized[0]}x{resized[1]} after --preprocess_mode {config.preprocess_mode}" if resized != size else ""
    what = f"the image is {size[0]}x{size[1]}{scaled}: smaller than the crop of {crop_width}x{crop_height}"
    if config.preprocess_mode == "crop":
        return data_error(path, what, "Remove the image, lower --crop_size, or use --preprocess_mode resize_and_crop")
    if not training:
        return data_error(path, what, "Use --preprocess_mode resize_and_crop or fixed")
    larger = range(config.load_size, _LARGEST_LOAD_SIZE)
    load_size = larger[0] + bisect_left(
        larger, True, key=lambda load_size: _fits(_resized(size, config, load_size), config)
    )
    return data_error(path, what, f"Raise --load_size to at least {load_size}, lower --crop_size, or remove the image")


def _fits(resized: tuple[int, int], config: DataConfig) -> bool:
    crop_height, crop_width = config.image_size
    return crop_width <= resized[0] and crop_height <= resized[1]
