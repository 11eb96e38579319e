"""Converts the ids in a label file to the classes of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from spade_model.config import DataConfig
from spade_model.data.plausibility import UNKNOWN_ID, is_black_and_white, repair
from spade_model.data.problem import DataError, Problem
from spade_model.registry import DATASETS


class WrongIds(DataError):
    """Raised for a label file with ids outside the classes that the options say."""


def known_ids(config: DataConfig) -> str:
    """Describes the ids that `to_classes` accepts, such as "the ids 0..181, and 255 for unknown"."""
    first = int(_is_shifted(config))
    known = f"the ids {first}..{config.label_nc - 1 + first}"
    unknown = ["0"] * first + [str(UNKNOWN_ID)]
    return f"{known}, and {' or '.join(unknown)} for unknown" if config.contain_dontcare_label else known


def class_ids(config: DataConfig) -> list[int]:
    """Returns the id that label files have for each class, in the order of the classes; [] for an RGB condition."""
    first = int(_is_shifted(config))
    ids = list(range(first, config.label_nc + first))
    return [*ids, 0 if first else UNKNOWN_ID] if config.contain_dontcare_label and ids else ids


def to_classes(ids: np.ndarray, config: DataConfig, path: Path) -> np.ndarray:
    """Converts the ids of a label file, int32 (H, W), to classes 0..config.num_labels-1, int32 (H, W).

    With contain_dontcare_label, id 255 becomes class label_nc. With ade20k_shift, id 0 becomes class label_nc too, and
    every other id is reduced by 1. Raises WrongIds with the largest wrong id, its first pixel and the number of wrong
    pixels.
    """
    unknown = ids == UNKNOWN_ID if config.contain_dontcare_label else np.zeros_like(ids, dtype=bool)
    classes = ids
    if _is_shifted(config):
        # Without an unknown class, an unknown pixel becomes label_nc, which is out of range like any other bad id.
        unknown = unknown | (ids == 0)
        classes = ids - 1
    classes = np.where(unknown, np.int32(config.label_nc), classes)
    wrong = (classes < 0) | (classes >= config.num_labels)
    if wrong.any():
        raise _wrong_ids(ids, wrong, config, path)
    return classes


def _is_shifted(config: DataConfig) -> bool:
    return config.ade20k_shift and DATASETS[config.dataset_mode].ids_from_1


def _wrong_ids(ids: np.ndarray, wrong: np.ndarray, config: DataConfig, path: Path) -> WrongIds:
    worst = int(ids[wrong].max())
    y, x = np.argwhere(wrong & (ids == worst))[0]
    what = (
        f"id {worst} at pixel x={x}, y={y} is outside the classes 0..{config.num_labels - 1} "
        f"({int(wrong.sum())} of {ids.size} pixels have such ids)"
    )
    if fix := repair(ids):
        return WrongIds(Problem(path, what, fix, in_file=True))
    fix, label_nc = _fix(ids, ids[wrong], worst, config)
    return WrongIds(Problem(path, what, fix, label_nc=label_nc))


def _fix(ids: np.ndarray, wrong_ids: np.ndarray, worst: int, config: DataConfig) -> tuple[str, int]:
    """Returns the fix, and the smallest label_nc that includes the ids, or 0 if more classes would not help."""
    spec = DATASETS[config.dataset_mode]
    if is_black_and_white(np.unique(ids).tolist()):
        return "The mask is black and white: save white as 1, or pass --contain_dontcare_label if it means unknown", 0
    if worst > UNKNOWN_ID and spec.byte_ids:
        return f"{config.dataset_mode} labels are 8-bit class ids; this looks like an instance or panoptic image", 0
    if _is_shifted(config) and worst == 0:
        return "Pass --contain_dontcare_label: with --ade20k_shift id 0 means unknown", 0
    if worst == UNKNOWN_ID and not config.contain_dontcare_label:
        others = wrong_ids[wrong_ids != UNKNOWN_ID]
        label_nc = int(others.max()) + 1 if others.size else 0
        larger = f", and --label_nc {label_nc} or more for the other ids" if label_nc > 0 else ""
        return f"Pass --contain_dontcare_label if 255 means unknown{larger}", max(0, label_nc)
    if worst < 0:
        return "Ids must not be negative: correct the image", 0
    return f"Set --label_nc to at least {worst + 1}, or correct the image", worst + 1
