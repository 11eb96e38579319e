"""Finds all problems of a data set in one pass, by reading each file as training does."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from spade_model.config import DataConfig
from spade_model.data.classes import to_classes
from spade_model.data.dataset import check_config
from spade_model.data.folders import list_files
from spade_model.data.images import (
    FULL_16,
    GREY_MODES,
    IMAGE_FORMATS,
    IMAGE_SUFFIXES,
    WIDE_MODES,
    orientation,
    read_header,
    read_ids,
    read_photograph,
)
from spade_model.data.item import ItemFiles, read_instances, require_size
from spade_model.data.plausibility import NOT_ANTIALIASED, doubt, is_antialiased
from spade_model.data.preprocess import plan_geometry
from spade_model.data.problem import DataError, Problem
from spade_model.errors import UserError
from spade_model.registry import DATASETS

_Result = TypeVar("_Result")


@dataclass
class FoundId:
    """The pixels with an id, and the label images that have such pixels."""

    pixels: int = 0
    images: int = 0


@dataclass
class Findings:
    """The problems and the ids that `inspect_dataset` found in a split of a data set."""

    problems: list[Problem] = field(default_factory=list)
    """All problems, warnings last."""
    items: int = 0
    label_images: int = 0
    """Number of label images that hold ids, without those that are anti-aliased."""
    ids: dict[int, FoundId] = field(default_factory=dict)
    """The ids in these label images as stored, in ascending order."""


def check_dataset(config: DataConfig, split: str, *, need_images: bool = True) -> list[Problem]:
    """Returns the problems that `inspect_dataset` finds; the list is empty if there are none."""
    return inspect_dataset(config, split, need_images=need_images).problems


def inspect_dataset(
    config: DataConfig,
    split: str,
    *,
    need_images: bool = True,
    num_threads: int = 8,
    progress: Callable[..., Iterable[Any]] | None = None,
) -> Findings:
    """Reads all files of the split "train" or "val"; returns all problems, and the ids that the label images hold.

    Args:
        need_images: also check photographs and their pairing; otherwise only labels and instances are checked.
        num_threads: number of threads that read files.
        progress: wraps the iterable of checked items and takes its length as `total`, like `tqdm.tqdm`.

    It never raises for bad data or options: wrong options are a problem without a path.
    """
    try:
        check_config(config)
        if DATASETS[config.dataset_mode].layout is None:
            return Findings()
        listing = list_files(config, split, need_images=need_images)
    except UserError as error:
        return Findings([Problem(None, str(error).rstrip("."), "Correct the options"), *_missing_folders(config)])
    found = Findings(items=len(listing.items))
    problems = listing.problems + [_stray(path) for path in listing.strays]
    remarks: dict[str, list[Path]] = {}
    brightest = (-1.0, Path())
    with ThreadPoolExecutor(num_threads) as pool:
        reports: Iterable[_Report] = pool.map(partial(_check_item, config=config, split=split), listing.items)
        if progress is not None:
            reports = progress(reports, total=len(listing.items))
        for files, report in zip(listing.items, reports, strict=True):
            problems += report.problems
            for remark, path in report.remarks:
                remarks.setdefault(remark, []).append(path)
            found.label_images += bool(report.ids)
            for number, pixels in report.ids.items():
                entry = found.ids.setdefault(number, FoundId())
                entry.pixels, entry.images = entry.pixels + pixels, entry.images + 1
            if files.image is not None:
                brightest = max(brightest, (report.brightest, files.image))
    problems += [_warning(remark, remarks[remark]) for remark in _WARNINGS if remark in remarks]
    if 0 <= brightest[0] < (FULL_16 + 1) // 4:
        problems.append(_dark_warning(*brightest))
    if found.ids and (warning := doubt(found.ids, config)):
        problems.append(warning)
    found.ids = dict(sorted(found.ids.items()))
    found.problems = sorted(problems, key=lambda problem: problem.is_warning)
    return found


@dataclass
class _Report:
    """The problems and remarks found in one item's files."""

    problems: list[Problem] = field(default_factory=list)
    remarks: list[tuple[str, Path]] = field(default_factory=list)
    """Keys of `_WARNINGS` and the files they apply to."""
    ids: dict[int, int] = field(default_factory=dict)
    """The number of pixels of each id in the label file; empty if it has none or is anti-aliased."""
    brightest: float = -1
    """The highest level of the photograph with image_bits 16; otherwise -1."""

    def attempt(self, action: Callable[[], _Result]) -> _Result | None:
        """Returns the action's result; if it raises DataError, stores the problem and returns None."""
        try:
            return action()
        except DataError as error:
            self.problems.append(error.problem)
            return None


def _check_item(files: ItemFiles, config: DataConfig, split: str) -> _Report:
    report = _Report()
    if config.label_nc:
        _look_at_ids(files.label, config, report)
    else:
        report.attempt(partial(read_photograph, files.label))
    # Mode and size come from the header, so that sizes are checked even if the ids are bad.
    mode, size = read_header(files.label) or ("", None)
    if mode == "P" and config.label_nc:
        report.remarks.append(("palette", files.label))
    if size is not None:
        # The random position of the crop does not matter: the check concerns only its size.
        random = np.random.default_rng(0) if split == "train" else None
        report.attempt(partial(plan_geometry, size, config, random, files.label))
    read_image = partial(read_photograph, channels=config.output_nc, bits=config.image_bits)
    for path, read in ((files.instance, read_instances), (files.image, read_image)):
        if path is not None:
            image = report.attempt(partial(read, path))
            if image is not None and size is not None:
                report.attempt(partial(require_size, image.size, path, size, files.label))
            if image is not None and path is files.image:
                _look_at_photograph(image, path, config, report)
    turned = [path for path in (files.label, files.instance, files.image) if path and orientation(path) != 1]
    report.remarks += [("turned", path) for path in turned]
    return report


def _look_at_ids(path: Path, config: DataConfig, report: _Report) -> None:
    """Counts the ids of a label file, and adds a remark if they are those of an anti-aliased image."""
    ids = report.attempt(partial(read_ids, path))
    if ids is None:
        return
    is_readable = report.attempt(partial(to_classes, ids, config, path)) is not None
    if not is_antialiased(ids):
        report.ids = dict(zip(*(part.tolist() for part in np.unique(ids, return_counts=True)), strict=True))
    elif is_readable:
        report.remarks.append(("anti-aliased", path))


def _look_at_photograph(photograph: Image.Image, path: Path, config: DataConfig, report: _Report) -> None:
    """Adds remarks where the file's mode differs from the options; `photograph` is the converted image."""
    mode, _ = read_header(path) or ("", None)
    is_grey = mode in GREY_MODES
    if is_grey != (config.output_nc == 1):
        report.remarks.append(("grey" if is_grey else "colour", path))
    if config.image_bits == 16:
        if mode not in WIDE_MODES:
            report.remarks.append(("8 bits", path))
        report.brightest = photograph.getextrema()[1]  # type: ignore[assignment]


def _missing_folders(config: DataConfig) -> list[Problem]:
    """Returns a problem for each folder that an option names and that does not exist."""
    options = DATASETS[config.dataset_mode].folder_options if config.dataset_mode in DATASETS else ()
    folders = {option: Path(getattr(config, option)) for option in options if getattr(config, option)}
    return [Problem(p, "no such folder", f"Check --{option}") for option, p in folders.items() if not p.is_dir()]


def _stray(path: Path) -> Problem:
    what = f"not an image file: its name ends in none of {' '.join(IMAGE_SUFFIXES)}"
    return Problem(path, what, f"It is ignored; remove it, or convert it to one of {', '.join(IMAGE_FORMATS)}", True)


_WARNINGS = {
    "anti-aliased": (
        "is anti-aliased ({} label image(s) in total): its borders have ids between those on either side",
        NOT_ANTIALIASED,
    ),
    "palette": (
        "has a palette ({} label image(s) in total): the palette's indexes are used as ids",
        "Check that the indexes, not the colours, are the classes",
    ),
    "turned": (
        "has an EXIF orientation ({} file(s) in total): viewers rotate the image, training reads it as stored",
        "Apply the tag to the pixels (PIL.ImageOps.exif_transpose), unless mask and photograph match as stored",
    ),
    "grey": (
        "is grey ({} photograph(s) in total): its channel is repeated for red, green and blue",
        "Pass --output_nc 1 to train on grey images",
    ),
    "colour": (
        "has colours ({} photograph(s) in total): training converts them to grey (luma)",
        "Leave --output_nc 1 out to train on colours",
    ),
    "8 bits": (
        "has 8 bits ({} photograph(s) in total): its levels are scaled to the 16-bit range",
        "Export it with 16 bits, unless its white should be as bright as in 16-bit photographs",
    ),
}
"""Properties that may be intended, and the fix if they are not. Files with the same property share one warning."""


def _warning(remark: str, paths: list[Path]) -> Problem:
    what, fix = _WARNINGS[remark]
    return Problem(paths[0], what.format(len(paths)), fix, True)


def _dark_warning(level: float, path: Path) -> Problem:
    what = f"no photograph has a higher level than this one, {level:.0f} of {FULL_16}: all are almost black"
    return Problem(
        path, what, "Scale the levels of all photographs by the same factor, up to 65535 or close to it", True
    )
