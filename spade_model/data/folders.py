"""Finds the files of a data set, and pairs label images with photographs and instance images."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from spade_model.config import DataConfig
from spade_model.data.item import ItemFiles
from spade_model.data.layouts import FileGroup, data_layout
from spade_model.data.problem import Problem
from spade_model.errors import UserError

_SHOWN_PROBLEMS = 5


@dataclass
class Listing:
    """The files of a data set, and the problems found while its folders were read."""

    items: list[ItemFiles] = field(default_factory=list)
    """One item for each label image, in natural order ("9" before "10"), at most max_dataset_size. A photograph or
    instance image that is missing or not needed is None."""
    problems: list[Problem] = field(default_factory=list)
    """Missing and empty folders, and files without a partner."""
    strays: list[Path] = field(default_factory=list)
    """Files that are not images, in folders that should contain only images."""


def list_files(config: DataConfig, split: str, *, need_images: bool) -> Listing:
    """Pairs the files of the split "train" or "val" and lists all problems of folders and names.

    Raises UserError only for a configuration that `data_layout` refuses.
    """
    layout = data_layout(config, split, need_images=need_images)
    listing = Listing()
    found = {group.role: _scan(group, layout.pairing_key, listing) for group in layout.groups}
    if config.no_pairing_check:
        found = {role: _by_position(files) for role, files in found.items()}
    labels = found[layout.labels.role]
    for group in layout.groups[1:]:
        files = found[group.role]
        # An empty group has already been reported once; do not report it again for each file of the other group.
        if labels and files:
            listing.problems += _unpaired(layout.labels, labels, group, files, by_name=not config.no_pairing_check)
            listing.problems += _unpaired(group, files, layout.labels, labels, by_name=not config.no_pairing_check)
    images = found[layout.images.role] if layout.images else {}
    instances = found[layout.instances.role] if layout.instances else {}
    for key, label in itertools.islice(labels.items(), config.max_dataset_size):
        listing.items.append(ItemFiles(label, images.get(key), instances.get(key)))
    return listing


def find_items(config: DataConfig, split: str, *, need_images: bool) -> list[ItemFiles]:
    """Returns the paired files of a split. Raises UserError with the first few problems if there are any."""
    listing = list_files(config, split, need_images=need_images)
    if listing.problems:
        lines = [str(problem) for problem in listing.problems[:_SHOWN_PROBLEMS]]
        if len(listing.problems) > _SHOWN_PROBLEMS:
            lines.append(f"... and {len(listing.problems) - _SHOWN_PROBLEMS} more; `spade doctor` lists them all.")
        raise UserError("\n".join(lines))
    return listing.items


_Key = tuple[int, str]
"""Index of the folder within its group, and the pairing key."""


def _scan(group: FileGroup, pairing_key: Callable[[str], str], listing: Listing) -> dict[_Key, Path]:
    """Returns the group's files by key, in natural order; adds problems and strays to the listing."""
    files: dict[_Key, Path] = {}
    for number, folder in enumerate(group.folders):
        if not folder.is_dir():
            if number == 0:
                fix = f"Check {group.options}, or pass the --dataset_mode that fits the folders"
                listing.problems.append(Problem(folder, f"no such folder ({group.role}s)", fix))
            continue
        for relative in sorted(_walk(folder, listing), key=_natural):
            path = folder / relative
            if not group.accepts(path.name):
                if not group.name_pattern:
                    listing.strays.append(path)
                continue
            key = (number, pairing_key(relative))
            if key in files:
                what = f"has the same pairing name as {files[key].name}, another {group.role}"
                listing.problems.append(Problem(path, what, "Rename or remove one of the two"))
            else:
                files[key] = path
    if not files and group.folders[0].is_dir():
        pattern = f" with names like {group.name_pattern}" if group.name_pattern else ""
        fix = f"Put the {group.role}s there or check {group.options}"
        listing.problems.append(Problem(group.folders[0], f"no {group.role} files{pattern}", fix))
    return files


def _walk(folder: Path, listing: Listing) -> Iterator[str]:
    """Yields the paths of all files below the folder, relative to it.

    It follows links to folders, but visits no folder twice; it skips hidden files and folders.
    """
    visited = set()

    def report(error: OSError) -> None:
        problem = Problem(Path(error.filename), f"cannot be listed ({error.strerror})", "Check its permissions")
        listing.problems.append(problem)

    for parent, folders, names in os.walk(folder, followlinks=True, onerror=report):
        real = os.path.realpath(parent)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        inner = Path(parent).relative_to(folder).as_posix()
        prefix = "" if inner == "." else inner + "/"
        yield from (prefix + name for name in names if not name.startswith("."))


def _natural(text: str) -> list[tuple[int, str]]:
    """Returns a sort key that orders runs of digits by value."""
    return [(int(part), part) if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", text)]


def _by_position(files: dict[_Key, Path]) -> dict[_Key, Path]:
    return {(0, str(position)): path for position, path in enumerate(files.values())}


def _unpaired(
    group: FileGroup, files: dict[_Key, Path], other: FileGroup, other_files: dict[_Key, Path], *, by_name: bool
) -> Iterator[Problem]:
    """Yields a problem for every file of the group without a partner in the other group."""
    fix = "Add the missing file, remove this one, or pass --no_pairing_check to pair by order"
    if not by_name:
        fix = "Pairing by order needs equal numbers of both kinds of files"
    for key, path in files.items():
        if key not in other_files:
            folder = other.folders[min(key[0], len(other.folders) - 1)]
            where = f"of the same name in {folder}" if by_name else f"left for it: there are {len(other_files)}"
            if by_name and "/" in key[1]:
                where = f"in the same subfolder, {folder / key[1]}.*"
            yield Problem(path, f"this {group.role} has no {other.role} {where}", fix)
