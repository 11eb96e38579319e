"""Reads the files of one item, for data sets, for checks of data sets and for single images."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from spade_kernels.label_map import instance_edges
from spade_model.config import DataConfig
from spade_model.data.classes import to_classes
from spade_model.data.images import FULL_16, orientation, read_ids, read_photograph
from spade_model.data.preprocess import Geometry
from spade_model.data.problem import data_error
from spade_model.data.sample import Sample


@dataclass(frozen=True)
class ItemFiles:
    """The files of one item of a data set."""

    label: Path
    image: Path | None = None
    instance: Path | None = None


def read_condition(path: Path, config: DataConfig) -> Image.Image:
    """Reads a label file as classes (mode I), or as an RGB image if label_nc is 0. Raises DataError for a bad file."""
    if config.label_nc == 0:
        return read_photograph(path)
    return Image.fromarray(to_classes(read_ids(path), config, path))


def read_instances(path: Path) -> Image.Image:
    """Reads the instance ids of a file (mode I). Raises DataError for a bad file."""
    return Image.fromarray(read_ids(path))


def require_size(size: tuple[int, int], path: Path, label_size: tuple[int, int], label_path: Path) -> None:
    """Raises DataError if a file's size differs from that of the item's label image. Sizes are (width, height)."""
    if size != label_size:
        what = "the image is {}x{}, but its label image {} is {}x{}".format(*size, label_path, *label_size)
        fix = "Make both the same size (resize labels with nearest-neighbour sampling)"
        if size == label_size[::-1] and orientation(path) != 1:
            fix = "Apply its EXIF orientation to its pixels: viewers rotate the image, training does not"
        raise data_error(path, what, fix)


def read_sample(files: ItemFiles, config: DataConfig, plan: Callable[[tuple[int, int]], Geometry]) -> Sample:
    """Reads and preprocesses an item. `plan` returns the geometry for the (width, height) of its files.

    Raises DataError for bad files.
    """
    condition = read_condition(files.label, config)
    geometry = plan(condition.size)
    edges = image = None
    if files.instance is not None:
        instances = read_instances(files.instance)
        require_size(instances.size, files.instance, condition.size, files.label)
        edges = instance_edges(_ids_tensor(instances, geometry))
    if files.image is not None:
        photograph = read_photograph(files.image, config.output_nc, config.image_bits)
        require_size(photograph.size, files.image, condition.size, files.label)
        image = _photograph_tensor(photograph, geometry)
    condition_tensor = (_ids_tensor if config.label_nc else _photograph_tensor)(condition, geometry)
    return Sample(condition_tensor, edges, image, files.label.stem)


def photograph_to_tensor(photograph: Image.Image) -> torch.Tensor:
    """Converts an image from `to_photograph`, resized or not, to float32 (3 or 1, H, W) in [-1, 1]."""
    levels, full = np.atleast_3d(np.asarray(photograph)), 255
    if photograph.mode == "F":
        # Bicubic resampling can exceed the range of levels; Pillow clips them only in 8-bit images.
        levels, full = levels.clip(0, FULL_16), FULL_16
    planes = np.ascontiguousarray(levels.transpose(2, 0, 1), dtype=np.float32)
    return torch.from_numpy(planes / np.float32(full / 2) - np.float32(1))


def _photograph_tensor(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    return photograph_to_tensor(geometry.apply(image, Image.Resampling.BICUBIC))


def _ids_tensor(image: Image.Image, geometry: Geometry) -> torch.Tensor:
    return torch.from_numpy(np.asarray(geometry.apply(image, Image.Resampling.NEAREST)).astype(np.int64))
