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
from spade_model.data.images import IMAGE_FORMATS, IMAGE_SUFFIXES, orientation, read_header, read_photograph
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

    Never raises for bad data: a configuration that fits no data set is a problem without a path.
    """
    try:
        check_config(config)
        if config.dataset_mode == "toy":
            return []
        listing = list_files(config, split, need_images=need_images)
    except UserError as error:
        return [Problem(None, str(error).rstrip("."), "Correct the options"), *_missing_folders(config)]
    problems = listing.problems + [_stray(path) for path in listing.strays]
    with_palette: list[Path] = []
    turned: list[Path] = []
    with ThreadPoolExecutor(num_threads) as pool:
        reports: Iterable[_Report] = pool.map(partial(_check_item, config=config, split=split), listing.items)
        if progress is not None:
            reports = progress(reports, total=len(listing.items))
        for files, report in zip(listing.items, reports, strict=True):
            problems += report.problems
            if report.has_palette:
                with_palette.append(files.label)
            turned += report.turned
    if with_palette:
        problems.append(_palette_warning(with_palette))
    if turned:
        problems.append(_orientation_warning(turned))
    return sorted(problems, key=lambda problem: problem.is_warning)


@dataclass
class _Report:
    """What is wrong with one item, whether its label image has a palette, and which files viewers show turned."""

    problems: list[Problem] = field(default_factory=list)
    has_palette: bool = False
    turned: list[Path] = field(default_factory=list)

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
    report.turned = [path for path in (files.label, files.instance, files.image) if path and orientation(path) != 1]
    return report


def _missing_folders(config: DataConfig) -> list[Problem]:
    """What the options name that is not there, when they cannot say what else would be needed."""
    options = ("label_dir", "image_dir", "instance_dir") if config.dataset_mode == "custom" else ("dataroot",)
    folders = {option: Path(getattr(config, option)) for option in options if getattr(config, option)}
    return [Problem(p, "no such folder", f"Check --{option}") for option, p in folders.items() if not p.is_dir()]


def _stray(path: Path) -> Problem:
    what = f"not an image file: its name ends in none of {' '.join(IMAGE_SUFFIXES)}"
    return Problem(path, what, f"It is ignored; remove it, or convert it to one of {', '.join(IMAGE_FORMATS)}", True)


def _orientation_warning(paths: list[Path]) -> Problem:
    """One warning for all files with a camera's tag that turns them."""
    what = (
        f"has an EXIF orientation, as {len(paths)} file(s) in all: viewers turn it, training reads it as it is stored"
    )
    fix = "Apply the tag to the pixels (PIL.ImageOps.exif_transpose), unless mask and photograph fit as they are stored"
    return Problem(paths[0], what, fix, True)


def _palette_warning(paths: list[Path]) -> Problem:
    """One warning for all label images with a palette."""
    what = f"has a palette, as {len(paths)} label image(s) in all: the palette's indexes are used as ids"
    return Problem(paths[0], what, "Check that the indexes, not the colours, are the classes", True)
