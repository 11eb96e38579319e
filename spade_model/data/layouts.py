"""The folders and file names of each data set's label images, photographs and instance images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from spade_model.config import DataConfig
from spade_model.data.images import IMAGE_SUFFIXES
from spade_model.errors import UserError


@dataclass(frozen=True)
class FileGroup:
    """The files of one role, such as photographs."""

    role: str
    """Name of the role in messages, in the singular."""
    options: str
    """Command line options that name the folders, or make these files unnecessary."""
    folders: tuple[Path, ...]
    """Folders that are searched, with their subfolders, in this order. The first one must exist."""
    name_pattern: str = ""
    """Regular expression that is searched for in file names; if empty, every image file is accepted."""

    def accepts(self, name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES) and re.search(self.name_pattern, name) is not None


@dataclass(frozen=True)
class Layout:
    """The groups of files of a data set and their pairing. A group is None when it is not needed."""

    labels: FileGroup
    images: FileGroup | None
    instances: FileGroup | None
    pairing_key: Callable[[str], str]
    """Maps a path, relative to its group's folder and with slashes, to a key that all files of one item share."""

    @property
    def groups(self) -> tuple[FileGroup, ...]:
        return tuple(group for group in (self.labels, self.images, self.instances) if group is not None)


def data_layout(config: DataConfig, split: str, *, need_images: bool) -> Layout:
    """Returns the layout of `config.dataset_mode` for the split "train" or "val".

    Raises UserError when the configuration asks for files that the data set does not have.
    """
    if config.dataset_mode == "custom":
        return _custom(config, need_images)
    root = Path(config.dataroot)
    make_groups, pairing_key = {
        "coco": (_coco, _relative_stem),
        "facades": (_facades, _relative_stem),
        "ade20k": (_ade20k, _stem),
        "cityscapes": (_cityscapes, _city_frame),
    }[config.dataset_mode]
    labels, images, instances = make_groups(root, split, config)
    if instances is None and not config.no_instance:
        raise UserError(f"{config.dataset_mode} has no instance images; pass --no_instance")
    return Layout(
        labels, images if need_images else None, None if config.no_instance else instances, pairing_key=pairing_key
    )


_Groups = tuple[FileGroup, FileGroup, FileGroup | None]

_ROOT_OR_NO_INSTANCES = "--dataroot (or pass --no_instance)"


def _coco(root: Path, split: str, config: DataConfig) -> _Groups:
    def folders(kind: str) -> tuple[Path, ...]:
        folder = root / f"{split}_{kind}"
        if split == "val" or config.coco_no_portraits:
            return (folder,)
        return folder, folder.with_name(f"{split}_{kind}_portrait")

    return (
        FileGroup("label image", "--dataroot", folders("label")),
        FileGroup("photograph", "--dataroot", folders("img")),
        FileGroup("instance image", _ROOT_OR_NO_INSTANCES, folders("inst")),
    )


def _facades(root: Path, split: str, config: DataConfig) -> _Groups:
    return (
        FileGroup("label image", "--dataroot", (root / f"{split}_label",)),
        FileGroup("photograph", "--dataroot", (root / f"{split}_img",)),
        None,
    )


def _ade20k(root: Path, split: str, config: DataConfig) -> _Groups:
    return (
        FileGroup("label image", "--dataroot", (root,), rf"_{split}_.*\.png$"),
        FileGroup("photograph", "--dataroot", (root,), rf"_{split}_.*\.jpg$"),
        None,
    )


def _cityscapes(root: Path, split: str, config: DataConfig) -> _Groups:
    annotations = (root / "gtFine" / split,)
    return (
        FileGroup("label image", "--dataroot", annotations, r"_labelIds\.png$"),
        FileGroup("photograph", "--dataroot", (root / "leftImg8bit" / split,)),
        FileGroup("instance image", _ROOT_OR_NO_INSTANCES, annotations, r"_instanceIds\.png$"),
    )


def _custom(config: DataConfig, need_images: bool) -> Layout:
    def group(role: str, options: str, folder: str) -> FileGroup:
        return FileGroup(role, options, (Path(folder),) if folder else ())

    layout = Layout(
        group("label image", "--label_dir", config.label_dir),
        group("photograph", "--image_dir", config.image_dir) if need_images else None,
        None if config.no_instance else group("instance image", "--instance_dir or --no_instance", config.instance_dir),
        pairing_key=_relative_stem,
    )
    if missing := [f"{g.options} (the folder of the {g.role}s)" for g in layout.groups if not g.folders]:
        raise UserError(f"--dataset_mode custom needs {', and '.join(missing)}")
    return layout


def _relative_stem(path: str) -> str:
    return posixpath.splitext(path)[0]


def _stem(path: str) -> str:
    return posixpath.splitext(posixpath.basename(path))[0]


def _city_frame(path: str) -> str:
    """City, sequence and frame number."""
    return "_".join(posixpath.basename(path).split("_")[:3])
