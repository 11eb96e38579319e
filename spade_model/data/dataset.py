"""The data sets. An item depends only on the configuration, the split, the epoch and the index."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from spade_model.config import DataConfig, check_choices
from spade_model.data.folders import find_items
from spade_model.data.item import ItemFiles, read_sample
from spade_model.data.preprocess import Geometry, plan_geometry
from spade_model.data.sample import Batch, Sample, collate
from spade_model.data.seeding import ITEM_AUGMENTATION, random_stream
from spade_model.errors import UserError
from spade_model.registry import DATASETS

SPLITS = ("train", "val")

ItemKey = int | tuple[int, int]
"""An index, or (epoch, index); an index alone means epoch 0."""


class SpadeDataset(Dataset[Sample]):
    """Base class of all data sets. Validation items are the same in every epoch.

    Subclasses define `__len__` and `sample`. Without `need_images` samples do not need a photograph.
    """

    def __init__(self, config: DataConfig, split: str, *, need_images: bool = True) -> None:
        self.config, self.split, self.need_images = config, split, need_images

    def __len__(self) -> int:
        raise NotImplementedError

    @property
    def first_label(self) -> Path | None:
        """The label file of the first item; None for a data set without files."""
        return None

    def __getitem__(self, key: ItemKey) -> Sample:
        """Returns the item; raises IndexError for an index out of range and DataError for bad files."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        augments = self.split == "train"
        return self.sample(
            index, random_stream(self.config.seed, ITEM_AUGMENTATION, epoch, index) if augments else None
        )

    def sample(self, index: int, random: np.random.Generator | None) -> Sample:
        """The item at a valid index, augmented unless `random` is None. Raises UserError for bad data."""
        raise NotImplementedError


class FolderDataset(SpadeDataset):
    """Items read from image files. The constructor raises UserError for missing folders and files without a partner."""

    def __init__(self, config: DataConfig, split: str, *, need_images: bool = True) -> None:
        super().__init__(config, split, need_images=need_images)
        self.items = find_items(config, split, need_images=need_images)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def first_label(self) -> Path | None:
        return self.items[0].label

    def sample(self, index: int, random: np.random.Generator | None) -> Sample:
        files = self.items[index]
        return read_sample(files, self.config, lambda size: plan_geometry(size, self.config, random, files.label))


def create_dataset(config: DataConfig, split: str, *, need_images: bool = True) -> SpadeDataset:
    """Creates the data set of the split "train" or "val"; without `need_images` its samples have no photographs.

    Raises UserError when the configuration does not fit the data set, folders are missing or empty, or a label image
    has no photograph or instance image, or the reverse.
    """
    check_config(config)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    return (DATASETS[config.dataset_mode].create or FolderDataset)(config, split, need_images=need_images)


def load_condition(
    label: str | Path,
    config: DataConfig,
    instance: str | Path | None = None,
    plan: Callable[[tuple[int, int]], Geometry] | None = None,
) -> Batch:
    """Reads a label image (an RGB image if label_nc is 0) and its instance image as a batch of one without photograph.

    `plan` returns the geometry for the (width, height) of the files. By default they are preprocessed like validation
    items, or, for a data set without files, resized to the size of generated images.

    Raises UserError for bad files, when `instance` is missing although the configuration uses instances, and when
    `instance` is given although the configuration does not use them.
    """
    check_config(config)
    if instance is None and not config.no_instance:
        raise UserError(
            f"{label}: the model takes instance boundaries, but there is no instance image. "
            "Give one with --instance (instance=... in Python); an image of the same size with a single value has no "
            "boundaries."
        )
    if instance is not None and config.no_instance:
        raise UserError(
            f"--instance {instance} needs a model that takes instance boundaries; this one was trained with "
            "--no_instance: leave --instance out"
        )
    files = ItemFiles(Path(label), None, None if instance is None else Path(instance))
    has_files = DATASETS[config.dataset_mode].layout is not None
    usual = config if has_files else replace(config, preprocess_mode="fixed")
    sample = read_sample(files, config, plan or (lambda size: plan_geometry(size, usual, None, files.label)))
    return collate([sample], config.num_labels)


def check_config(config: DataConfig) -> None:
    """Raises UserError for options that are out of range, contradict each other or do not fit this data set."""
    check_choices(config)
    spec = DATASETS[config.dataset_mode]
    least = {"label_nc": 0, "load_size": 1, "crop_size": 1, "batch_size": 1, "num_workers": 0}
    least |= {"max_dataset_size": 1, "seed": 0}
    for name, minimum in least.items():
        if getattr(config, name) < minimum:
            raise UserError(f"--{name} {getattr(config, name)} is too small; it must be at least {minimum}")
    if not (math.isfinite(config.aspect_ratio) and config.aspect_ratio > 0) or config.image_size[0] < 1:
        raise UserError(
            f"--aspect_ratio {config.aspect_ratio} gives no image with --crop_size {config.crop_size}; "
            "it is width / height"
        )
    if config.image_bits == 16 and config.output_nc != 1:
        raise UserError(
            f"--image_bits 16 with --output_nc {config.output_nc}: colours have 8 bits a channel here. Pass "
            "--output_nc 1 for grey images of 16 bits, or --image_bits 8"
        )
    if config.label_nc == 0 and not spec.rgb_condition:
        able = " and ".join(sorted(name for name, spec in DATASETS.items() if spec.rgb_condition))
        raise UserError(
            f"--label_nc 0 (an RGB image as the condition) works with --dataset_mode {able}, not {config.dataset_mode}"
        )
    if spec.check is not None:
        spec.check(config)
