"""Finds everything that is wrong with a data set at once, by reading each file as training would."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from spade_model.config import DataConfig
from spade_model.data.dataset import check_config
from spade_model.data.folders import list_files
from spade_model.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, read_header, read_photograph
from spade_model.data.item import ItemFiles, read_condition, read_instances, require_size
from spade_model.data.preprocess import plan_geometry
from spade_model.data.problem import DataError, Problem
from spade_model.errors import UserError

_Result = TypeVar("_Result")


def check_dataset(
    config: DataConfig,
    split: str,
    *,
    need_images: bool = True,
    num_threads: int = 8,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> list[Problem]:
    """Every problem of the split "train" or "val", warnings last; an empty list when the data set is sound.

    Args:
        need_images: also check the photographs and that they pair; otherwise labels and instances alone.
        num_threads: files read at a time.
        progress: wraps the iterable of checked items and takes its length as `total`, like `tqdm.tqdm`.

    Never raises for bad data: a configuration that fits no data set is a problem of the data root.
    """
    root = Path(config.label_dir if config.dataset_mode == "custom" else config.dataroot)
    try:
        check_config(config)
        if config.dataset_mode == "toy":
            return []
        listing = list_files(config, split, need_images=need_images)
    except UserError as error:
        return [Problem(root, str(error).rstrip("."), "Correct the options")]
    problems = listing.problems + [_stray(path) for path in listing.strays]
    with_palette: list[Path] = []
    with ThreadPoolExecutor(num_threads) as pool:
        reports: Iterable[_Report] = pool.map(partial(_check_item, config=config, split=split), listing.items)
        if progress is not None:
            reports = progress(reports, total=len(listing.items))
        for files, report in zip(listing.items, reports, strict=True):
            problems += report.problems
            if report.has_palette:
                with_palette.append(files.label)
    if with_palette:
        problems.append(_palette_warning(with_palette))
    return sorted(problems, key=lambda problem: problem.is_warning)


@dataclass
class _Report:
    """What is wrong with one item, and whether its label image has a palette."""

    problems: list[Problem] = field(default_factory=list)
    has_palette: bool = False

    def attempt(self, action: Callable[[], _Result]) -> _Result | None:
        """The action's result; or None, when it finds a problem."""
        try:
            return action()
        except DataError as error:
            self.problems.append(error.problem)
            return None


def _check_item(files: ItemFiles, config: DataConfig, split: str) -> _Report:
    report = _Report()
    report.attempt(partial(read_condition, files.label, config))
    # From the header, so that a label image with bad ids does not hide problems of size.
    mode, size = read_header(files.label) or ("", None)
    report.has_palette = mode == "P" and config.label_nc > 0
    if size is not None:
        # The corner of the crop does not matter: it fits everywhere or nowhere.
        random = np.random.default_rng(0) if split == "train" else None
        report.attempt(partial(plan_geometry, size, config, random, files.label))
    for path, read in ((files.instance, read_instances), (files.image, read_photograph)):
        if path is not None:
            image = report.attempt(partial(read, path))
            if image is not None and size is not None:
                report.attempt(partial(require_size, image.size, path, size, files.label))
    return report


def _stray(path: Path) -> Problem:
    what = f"not an image file: its name ends in none of {' '.join(IMAGE_SUFFIXES)}"
    return Problem(path, what, f"It is ignored; remove it, or convert it to one of {', '.join(IMAGE_FORMATS)}", True)


def _palette_warning(paths: list[Path]) -> Problem:
    """One warning for all label images with a palette."""
    what = f"has a palette, as {len(paths)} label image(s) in all: the palette's indexes are used as ids"
    return Problem(paths[0], what, "Check that the indexes, not the colours, are the classes", True)
