"""The data sets. An item depends only on the configuration, the split, the epoch and the index."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from spade_kernels.label_map import instance_edges
from spade_model.config import DataConfig
from spade_model.data.folders import find_items
from spade_model.data.images import to_photograph
from spade_model.data.item import ItemFiles, photograph_to_tensor, read_sample
from spade_model.data.sample import Batch, Sample, collate
from spade_model.data.seeding import ITEM_AUGMENTATION, random_stream
from spade_model.data.toy import SMALLEST_SIDE, TOY_CLASSES, draw_toy
from spade_model.errors import UserError

SPLITS = ("train", "val")

TOY_LENGTHS = {"train": 2**16, "val": 512}
"""Number of images in each split of the toy data set, unless max_dataset_size is smaller."""

ItemKey = int | tuple[int, int]
"""An index, or (epoch, index); an index alone means epoch 0."""


class SpadeDataset(Dataset[Sample]):
    """Base class of all data sets. Validation items are the same in every epoch."""

    def __init__(self, config: DataConfig, split: str) -> None:
        self.config = config
        self.split = split

    def __len__(self) -> int:
        raise NotImplementedError

    def __getitem__(self, key: ItemKey) -> Sample:
        """Returns the item; raises IndexError for an index out of range and DataError for bad files."""
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of a data set of {len(self)}")
        augments = self.split == "train"
        return self._sample(
            index, random_stream(self.config.seed, ITEM_AUGMENTATION, epoch, index) if augments else None
        )

    def _sample(self, index: int, random: np.random.Generator | None) -> Sample:
        raise NotImplementedError


class FolderDataset(SpadeDataset):
    """Items read from image files."""

    def __init__(self, config: DataConfig, split: str, items: list[ItemFiles]) -> None:
        super().__init__(config, split)
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def _sample(self, index: int, random: np.random.Generator | None) -> Sample:
        return read_sample(self.items[index], self.config, random)


class ToyDataset(SpadeDataset):
    """Landscapes drawn on demand, at the size of generated images; the preprocess mode is ignored."""

    def __init__(self, config: DataConfig, split: str, *, need_images: bool) -> None:
        super().__init__(config, split)
        self.need_images = need_images

    def __len__(self) -> int:
        return min(self.config.max_dataset_size, TOY_LENGTHS[self.split])

    def _sample(self, index: int, random: np.random.Generator | None) -> Sample:
        height, width = self.config.image_size
        toy = draw_toy(self.config.seed, self.split, index, height, width)
        flip = random is not None and not self.config.no_flip and bool(random.random() < 0.5)
        step = -1 if flip else 1
        labels, instances, rgb = (plane[:, ::step].copy() for plane in (toy.labels, toy.instances, toy.image))
        image = None
        if self.need_images:
            photograph = to_photograph(Image.fromarray(rgb), self.config.output_nc, self.config.image_bits)
            image = photograph_to_tensor(photograph)
        return Sample(
            torch.from_numpy(labels.astype(np.int64)),
            None if self.config.no_instance else instance_edges(torch.from_numpy(instances)),
            image,
            f"toy_{index:06d}",
        )


def create_dataset(config: DataConfig, split: str, *, need_images: bool = True) -> SpadeDataset:
    """Creates the data set of the split "train" or "val"; without `need_images` its samples have no photographs.

    Raises UserError when the configuration does not fit the data set, folders are missing or empty, or a label image
    has no photograph or instance image, or the reverse.
    """
    check_config(config)
    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if config.dataset_mode == "toy":
        return ToyDataset(config, split, need_images=need_images)
    return FolderDataset(config, split, find_items(config, split, need_images=need_images))


def load_condition(label: str | Path, config: DataConfig, instance: str | Path | None = None) -> Batch:
    """Reads a label image (an RGB image if label_nc is 0) and its instance image as a batch of one without photograph.

    The images are preprocessed like validation items; for the toy data set, they are resized to the size of generated
    images. Raises UserError for bad files, when `instance` is missing although the configuration uses instances, and
    when `instance` is given although the configuration does not use them.
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
    if config.dataset_mode == "toy":
        config = replace(config, preprocess_mode="fixed")
    files = ItemFiles(Path(label), None, None if instance is None else Path(instance))
    return collate([read_sample(files, config, None)], config.num_labels)


def check_config(config: DataConfig) -> None:
    """Raises UserError for options that are out of range or contradict each other."""
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
    if config.label_nc == 0 and config.dataset_mode not in ("custom", "facades"):
        raise UserError(
            "--label_nc 0 (an RGB image as the condition) works with --dataset_mode custom and facades, "
            f"not {config.dataset_mode}"
        )
    if config.dataset_mode == "toy":
        _check_toy_config(config)


def _check_toy_config(config: DataConfig) -> None:
    if config.label_nc < len(TOY_CLASSES):
        raise UserError(f"--label_nc {config.label_nc} is too small; the toy data set has {len(TOY_CLASSES)} classes")
    if min(config.image_size) < SMALLEST_SIDE:
        height, width = config.image_size
        raise UserError(f"toy images of {width}x{height} are too small; their sides must be at least {SMALLEST_SIDE}")
