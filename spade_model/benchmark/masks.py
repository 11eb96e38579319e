"""The masks of the benchmarks: the user's masks or toy landscapes, and extreme cases such as noise."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from spade_kernels import LabelMap
from spade_model.benchmark.shapes import resolutions
from spade_model.config import DataConfig, default_data_config
from spade_model.data import DATASETS, create_dataset
from spade_model.data.sample import collate
from spade_model.errors import UserError

KERNEL_SIZE = 3
_SEARCHED = 64
_MIRRORED: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))


def coco_or_toy(dataroot: str, crop_size: int) -> DataConfig:
    """Returns the configuration of a folder in the coco layout, or of toy landscapes if `dataroot` is empty."""
    data = default_data_config("coco" if dataroot else "toy")
    return replace(data, dataroot=dataroot, crop_size=crop_size)


def bench_masks(data: DataConfig, count: int, *, every_kind: bool = True) -> dict[str, list[LabelMap]]:
    """Returns a dict from the kind of masks to masks of one image each, all with the classes and size of `data`.

    The first kind is called "real", or has the name of the data set if it has no files.

    Args:
        data: the data set from which the masks of the first kind are read.
        count: number of masks of the first kind.
        every_kind: add one mask of each other kind: a "toy" landscape; "busiest", the one of the data set's first
            masks with the largest fraction of distinct windows; "noise", random pixels; and "constant", a single class.

    Raises:
        UserError: the masks cannot be read, or the condition is not a label map.
    """
    found = _read(data, _SEARCHED if every_kind else count)
    kinds = {"real" if DATASETS[data.dataset_mode].layout else data.dataset_mode: found[:count]}
    if not every_kind:
        return kinds
    labels, edges = found[0].num_labels, found[0].edges is not None
    if "toy" not in kinds and labels >= (toy := default_data_config("toy")).label_nc:
        toy = replace(toy, crop_size=data.crop_size, aspect_ratio=data.aspect_ratio, no_instance=not edges)
        landscape = _read(toy, 1)[0]
        kinds["toy"] = [LabelMap(landscape.labels, labels, landscape.edges)]
    kinds["busiest"], kinds["noise"] = busiest(found, 1), noise(found[0], 1)
    zeros = torch.zeros_like(found[0].labels)
    kinds["constant"] = [LabelMap(zeros, labels, zeros.bool() if edges else None)]
    return kinds


def busiest(masks: Sequence[LabelMap], count: int) -> list[LabelMap]:
    """Returns the `count` masks with the largest fractions of distinct windows, in ascending order."""
    return sorted(masks, key=lambda mask: distinct_fraction(mask, mask.shape[1:]))[-count:]


def noise(example: LabelMap, count: int) -> list[LabelMap]:
    """Returns `count` masks with the example's shape and classes, in which each pixel has a random label and edge."""
    random, shape, labels = torch.Generator().manual_seed(0), example.shape, example.num_labels
    return [
        LabelMap(
            torch.randint(labels, shape, generator=random),
            labels,
            torch.rand(shape, generator=random) < 0.5 if example.edges is not None else None,
        )
        for _ in range(count)
    ]


def save_masks(kinds: dict[str, list[LabelMap]], path: Path) -> None:
    """Saves a dict of `bench_masks`, so that other processes need not read the data set again."""
    plain = {kind: [(m.labels, m.num_labels, m.edges) for m in masks] for kind, masks in kinds.items()}
    torch.save(plain, path)


def load_masks(path: Path) -> dict[str, list[LabelMap]]:
    """Loads the masks that `save_masks` saved."""
    plain = torch.load(path, weights_only=True)
    return {kind: [LabelMap(*parts) for parts in masks] for kind, masks in plain.items()}


def batches(masks: Sequence[LabelMap], size: int, count: int) -> list[LabelMap]:
    """Returns `count` batches of `size` masks. A mask repeats only after all masks and mirror images were used."""
    every = itertools.cycle(_mirrored(mask, dims) for dims in _MIRRORED for mask in masks)
    return [LabelMap.cat(list(itertools.islice(every, size))) for _ in range(count)]


def fresh(mask: LabelMap) -> LabelMap:
    """Returns a copy of the mask without its window indexes, so that building them is timed."""
    return LabelMap(mask.labels, mask.num_labels, mask.edges)


def distinct_fraction(mask: LabelMap, size: tuple[int, ...]) -> float:
    """Returns the number of distinct modulation windows per pixel, at size (h, w)."""
    return len(fresh(mask).window_index(size, KERNEL_SIZE).modulation) / (len(mask) * size[0] * size[1])


def distinct_fractions(kinds: dict[str, list[LabelMap]]) -> dict[str, dict[str, float]]:
    """Returns the mean `distinct_fraction` of each kind at each resolution, with keys such as "128 x 128"."""
    return {
        kind: {
            f"{h} x {w}": round(sum(distinct_fraction(mask, (h, w)) for mask in masks) / len(masks), 4)
            for h, w in resolutions(masks[0])
        }
        for kind, masks in kinds.items()
    }


def settings(ngf: int, kinds: dict[str, list[LabelMap]]) -> dict[str, Any]:
    """Returns the description of the network and the masks that a BenchRun holds as its `settings`."""
    masks = next(iter(kinds.values()))
    return {
        "ngf": ngf,
        "channels": masks[0].channels,
        "masks": len(masks),
        "distinct windows": distinct_fractions(kinds),
    }


def _mirrored(mask: LabelMap, dims: tuple[int, ...]) -> LabelMap:
    return LabelMap(mask.labels.flip(dims), mask.num_labels, None if mask.edges is None else mask.edges.flip(dims))


def _read(data: DataConfig, count: int) -> list[LabelMap]:
    """Reads up to `count` masks, first those of the split val, then those of train, resized to the generator's size."""
    data = replace(data, preprocess_mode="fixed", no_flip=True, load_size=data.crop_size)
    datasets = [create_dataset(data, "val", need_images=False)]
    if len(datasets[0]) < count:
        with suppress(UserError):
            datasets.append(create_dataset(data, "train", need_images=False))
    samples = [dataset[i] for dataset in datasets for i in range(min(count, len(dataset)))][:count]
    masks = [collate([sample], data.num_labels).segmap for sample in samples]
    if not all(isinstance(mask, LabelMap) for mask in masks):
        raise UserError("there is nothing to compare for an RGB condition: pass label maps, with --label_nc 1 or more")
    return masks  # type: ignore[return-value]
