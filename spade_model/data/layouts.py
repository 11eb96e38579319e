"""The folders and file names of each data set's label images, photographs and instance images."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from spade_model.config import DataConfig
from spade_model.data.images import IMAGE_SUFFIXES
from spade_model.errors import UserError
from spade_model.registry import DATASETS, DatasetSpec


@dataclass(frozen=True)
class FileGroup:
    """The files of one role, such as photographs."""

    role: str
    """Name of the role in messages, in the singular."""
    options: str
    """Text for messages: the command line options that hold the folders, or that make these files unnecessary."""
    folders: tuple[Path, ...]
    """Folders that are searched, with their subfolders, in this order. The first one must exist."""
    name_pattern: str = ""
    """Regular expression that is searched for in file names; if empty, every image file is accepted."""

    def accepts(self, name: str) -> bool:
        return name.lower().endswith(IMAGE_SUFFIXES) and re.search(self.name_pattern, name) is not None


def relative_stem(path: str) -> str:
    """The path without its suffix."""
    return posixpath.splitext(path)[0]


@dataclass(frozen=True)
class Layout:
    """The groups of files of a data set and their pairing. A group is None when it does not exist or is not needed."""

    labels: FileGroup
    images: FileGroup | None
    instances: FileGroup | None = None
    pairing_key: Callable[[str], str] = relative_stem
    """Maps a path, relative to its group's folder and with slashes, to a key that all files of one item share."""

    @property
    def groups(self) -> tuple[FileGroup, ...]:
        return tuple(group for group in (self.labels, self.images, self.instances) if group is not None)


def data_layout(config: DataConfig, split: str, *, need_images: bool) -> Layout:
    """Returns the layout of `config.dataset_mode` for the split "train" or "val".

    Raises UserError when the configuration asks for files that the data set does not have, or names no folder for them.
    """
    find = DATASETS[config.dataset_mode].layout
    assert find is not None
    layout = find(config, split)
    if layout.instances is None and not config.no_instance:
        raise UserError(f"{config.dataset_mode} has no instance images; pass --no_instance")
    layout = replace(
        layout,
        images=layout.images if need_images else None,
        instances=None if config.no_instance else layout.instances,
    )
    if missing := [f"{g.options} (the folder of the {g.role}s)" for g in layout.groups if not g.folders]:
        raise UserError(f"--dataset_mode {config.dataset_mode} needs {', and '.join(missing)}")
    return layout


_ROOT_OR_NO_INSTANCES = "--dataroot (or pass --no_instance)"


def _coco(config: DataConfig, split: str) -> Layout:
    def folders(kind: str) -> tuple[Path, ...]:
        folder = Path(config.dataroot, f"{split}_{kind}")
        if split == "val" or config.coco_no_portraits:
            return (folder,)
        return folder, folder.with_name(f"{split}_{kind}_portrait")

    return Layout(
        FileGroup("label image", "--dataroot", folders("label")),
        FileGroup("photograph", "--dataroot", folders("img")),
        FileGroup("instance image", _ROOT_OR_NO_INSTANCES, folders("inst")),
    )


def _ade20k(config: DataConfig, split: str) -> Layout:
    root = (Path(config.dataroot),)
    return Layout(
        FileGroup("label image", "--dataroot", root, rf"_{split}_.*\.png$"),
        FileGroup("photograph", "--dataroot", root, rf"_{split}_.*\.jpg$"),
        pairing_key=lambda path: relative_stem(posixpath.basename(path)),
    )


def _cityscapes(config: DataConfig, split: str) -> Layout:
    annotations = (Path(config.dataroot, "gtFine", split),)
    return Layout(
        FileGroup("label image", "--dataroot", annotations, r"_labelIds\.png$"),
        FileGroup("photograph", "--dataroot", (Path(config.dataroot, "leftImg8bit", split),)),
        FileGroup("instance image", _ROOT_OR_NO_INSTANCES, annotations, r"_instanceIds\.png$"),
        # City, sequence and frame number.
        pairing_key=lambda path: "_".join(posixpath.basename(path).split("_")[:3]),
    )


def _facades(config: DataConfig, split: str) -> Layout:
    return Layout(
        FileGroup("label image", "--dataroot", (Path(config.dataroot, f"{split}_label"),)),
        FileGroup("photograph", "--dataroot", (Path(config.dataroot, f"{split}_img"),)),
    )


def _custom(config: DataConfig, split: str) -> Layout:
    def group(role: str, options: str, folder: str) -> FileGroup:
        return FileGroup(role, options, (Path(folder),) if folder else ())

    return Layout(
        group("label image", "--label_dir", config.label_dir),
        group("photograph", "--image_dir", config.image_dir),
        group("instance image", "--instance_dir or --no_instance", config.instance_dir),
    )


COCO = DatasetSpec(DataConfig(), layout=_coco, byte_ids=True)
ADE20K = DatasetSpec(DataConfig(label_nc=150, no_instance=True), layout=_ade20k, byte_ids=True, ids_from_1=True)
CITYSCAPES = DatasetSpec(
    DataConfig(
        label_nc=35,
        contain_dontcare_label=False,
        preprocess_mode="fixed",
        load_size=512,
        crop_size=512,
        aspect_ratio=2.0,
        batch_size=16,
    ),
    layout=_cityscapes,
)
FACADES = DatasetSpec(
    DataConfig(label_nc=13, contain_dontcare_label=False, no_instance=True),
    layout=_facades,
    rgb_condition=True,
    byte_ids=True,
)
CUSTOM = DatasetSpec(
    DataConfig(label_nc=13, contain_dontcare_label=False),
    layout=_custom,
    folder_options=("label_dir", "image_dir", "instance_dir"),
    splits=("train",),
    rgb_condition=True,
)
