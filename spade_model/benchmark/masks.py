"""The masks that are timed: the user's or toy landscapes, the busiest of them, uniform noise and one class."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace

import torch

from spade_kernels import LabelMap
from spade_model.config import DataConfig, default_data_config
from spade_model.data import DATASETS, create_dataset
from spade_model.data.sample import collate
from spade_model.errors import UserError

KERNEL_SIZE = 3
_SEARCHED = 64


def bench_masks(data: DataConfig, count: int, *, every_kind: bool = True) -> dict[str, list[LabelMap]]:
    """By kind, masks of one image each, all with the classes and size of `data`.

    Args:
        data: a folder of masks, or a data set without files.
        count: masks of the first kind: "real", or named after the data set without files.
        every_kind: also one "toy" landscape, the "busiest" (largest fraction of distinct windows) of the first masks
            in the folder, uniform "noise" and "constant".

    Raises:
        UserError: the masks cannot be read, or the condition is not a label map.
    """
    found = _read(data, _SEARCHED if every_kind else count)
    kinds = {"real" if DATASETS[data.dataset_mode].layout else data.dataset_mode: found[:count]}
    if not every_kind:
        return kinds
    shape, labels, edges = found[0].shape, found[0].num_labels, found[0].edges is not None
    random = torch.Generator().manual_seed(0)
    if "toy" not in kinds and labels >= (toy := default_data_config("toy")).label_nc:
        toy = replace(toy, crop_size=data.crop_size, aspect_ratio=data.aspect_ratio, no_instance=not edges)
        landscape = _read(toy, 1)[0]
        kinds["toy"] = [LabelMap(landscape.labels, labels, landscape.edges)]
    noise = torch.randint(labels, shape, generator=random)
    noisy_edges = torch.rand(shape, generator=random) < 0.5 if edges else None
    kinds["busiest"] = [max(found, key=lambda mask: distinct_fraction(mask, mask.shape[1:]))]
    kinds["noise"] = [LabelMap(noise, labels, noisy_edges)]
    kinds["constant"] = [
        LabelMap(torch.zeros_like(noise), labels, torch.zeros_like(noise, dtype=torch.bool) if edges else None)
    ]
    return kinds


def fresh(mask: LabelMap) -> LabelMap:
    """A copy of the mask without its window indexes, so that building them is timed."""
    return LabelMap(mask.labels, mask.num_labels, mask.edges)


def resolutions(mask: LabelMap) -> list[tuple[int, int]]:
    """(h, w) of the generator's feature maps, smallest first: 1/32 of the mask to all of it."""
    height, width = mask.shape[1:]
    return [(height // step, width // step) for step in (32, 16, 8, 4, 2, 1)]


def distinct_fraction(mask: LabelMap, size: tuple[int, ...]) -> float:
    """Distinct modulation windows over pixels, at size (h, w)."""
    return len(fresh(mask).window_index(size, KERNEL_SIZE).modulation) / (len(mask) * size[0] * size[1])


def distinct_fractions(kinds: dict[str, list[LabelMap]]) -> dict[str, dict[str, float]]:
    """Mean `distinct_fraction` by kind and "height x width"."""
    return {
        kind: {
            f"{h} x {w}": round(sum(distinct_fraction(mask, (h, w)) for mask in masks) / len(masks), 4)
            for h, w in resolutions(masks[0])
        }
        for kind, masks in kinds.items()
    }


def _read(data: DataConfig, count: int) -> list[LabelMap]:
    """Up to `count` masks of the split val, then of train, resized to the size the generator makes."""
    data = replace(data, preprocess_mode="fixed", no_flip=True, load_size=data.crop_size)
    datasets = [create_dataset(data, "val", need_images=False)]
    if len(datasets[0]) < count:
        with suppress(UserError):
            datasets.append(create_dataset(data, "train", need_images=False))
    samples = [dataset[i] for dataset in datasets for i in range(min(count, len(dataset)))][:count]
    masks = [collate([sample], data.num_labels).segmap for sample in samples]
    if not all(isinstance(mask, LabelMap) for mask in masks):
        raise UserError(
            "there is nothing to compare for an RGB condition; choose label maps, with --label_nc 1 or more"
        )
    return masks  # type: ignore[return-value]
