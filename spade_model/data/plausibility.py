"""Detects label files that can be read, but whose ids their author hardly means."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from spade_model.config import DataConfig
from spade_model.data.problem import Problem
from spade_model.registry import DATASETS

UNKNOWN_ID = 255
"""The id that stands for "no class" in label files."""

NOT_ANTIALIASED = "Export it without anti-aliasing, or resize it with nearest-neighbour sampling"

# In interpolated masks 0.25 to 0.5 of the pixels at borders have interpolated ids, in crisp masks of photographs none.
_INTERPOLATED_SHARE = 0.05
_FEWEST_INTERPOLATED_IDS = 3


def repair(ids: np.ndarray) -> str:
    """Returns the instruction to repair an id image (H, W) whose ids cannot be meant as they are; otherwise ""."""
    if is_antialiased(ids):
        return f"The mask is anti-aliased, its borders have ids between those on either side. {NOT_ANTIALIASED}"
    factor = common_factor(np.unique(ids).tolist())
    return f"All its ids are multiples of {factor}: divide them by {factor}" if factor > 1 else ""


def is_antialiased(ids: np.ndarray) -> bool:
    """Returns True if ids at borders of an id image (H, W) lie between those on either side and fill no area."""
    low, high = _extremes(ids)
    is_border = low != high
    areas = np.unique(ids[~is_border])
    is_between = (low < ids) & (ids < high)
    candidates, counts = np.unique(ids[is_between], return_counts=True)
    rare = ~np.isin(candidates, areas)
    share = counts[rare].sum() / max(1, is_border.sum())
    return len(areas) > 1 and rare.sum() >= _FEWEST_INTERPOLATED_IDS and bool(share > _INTERPOLATED_SHARE)


def _extremes(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the lowest and the highest id in the 3 x 3 neighbourhood of every pixel."""
    low = high = np.pad(ids, 1, mode="edge")
    low = np.minimum.reduce([low[:-2], low[1:-1], low[2:]])
    high = np.maximum.reduce([high[:-2], high[1:-1], high[2:]])
    return (
        np.minimum.reduce([low[:, :-2], low[:, 1:-1], low[:, 2:]]),
        np.maximum.reduce([high[:, :-2], high[:, 1:-1], high[:, 2:]]),
    )


def common_factor(ids: Collection[int]) -> int:
    """Returns the constant that ids seem to have been multiplied with, or 1.

    Ids count as multiplied only if, after the division, at least half of the ids from 0 to the largest occur. A single
    id counts only if its factor is that of a conversion from 8 bits to 16.
    """
    wanted = set(ids) - {UNKNOWN_ID}
    factor = int(np.gcd.reduce(list(wanted))) if wanted else 0
    if factor < 2:
        return 1
    for widened in (256, 257):
        if factor % widened == 0:
            return widened
    is_dense = 2 * len(wanted) >= max(wanted) // factor + 1
    return factor if is_dense and len(wanted) > 1 else 1


def is_black_and_white(ids: Collection[int]) -> bool:
    """Returns True if the ids are 0 and 255, as in a mask of one class that was saved for viewing."""
    return set(ids) == {0, UNKNOWN_ID}


def closing_map(ids: Collection[int]) -> str:
    """Returns a text that maps the sorted ids to 0, 1, 2, ..., such as "0 -> 0, 7..9 -> 1..3"."""
    runs: list[list[tuple[int, int]]] = []
    for new, old in enumerate(sorted(ids)):
        if not runs or old != runs[-1][-1][0] + 1:
            runs.append([])
        runs[-1].append((old, new))
    return ", ".join(f"{_span(run[0][0], run[-1][0])} -> {_span(run[0][1], run[-1][1])}" for run in runs)


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}..{last}"


def doubt(ids: Collection[int], config: DataConfig) -> Problem | None:
    """Returns a warning about the set of ids that occur in a data set's label images, or None."""
    if is_black_and_white(ids):
        what = "the label images hold the ids 0 and 255 only, like black-and-white masks"
        return Problem(None, what, "If white is a class, save it as 1 and pass --label_nc 2", True)
    # In data sets with a fixed layout the ids are fixed, too, and some need not occur.
    if "label_dir" not in DATASETS[config.dataset_mode].folder_options:
        return None
    known = set(ids) - ({UNKNOWN_ID} if config.contain_dontcare_label else set())
    if (factor := common_factor(known)) > 1:
        what = f"all ids are multiples of {factor}: they seem to be multiplied by it"
        return Problem(None, what, f"Divide them by {factor}, and pass --label_nc {max(known) // factor + 1}", True)
    if len(known) > 1 and len(known) <= max(known):
        what = f"the ids have gaps: {len(known)} of 0..{max(known)} occur"
        fix = f"If the others do not exist, map {closing_map(known)}, and pass --label_nc {len(known)}"
        return Problem(None, what, fix, True)
    return None
