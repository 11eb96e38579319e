"""The data sets that --dataset_mode can name and the generators that --netG can name.

`spade_model.data` and `spade_model.networks` register those of this package. Other modules register theirs likewise,
`DATASETS["mine"] = DatasetSpec(...)`, before they train, generate or start the command line; CONTRIBUTING.md says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from spade_model.config import DataConfig, ModelConfig
    from spade_model.data import Layout, SpadeDataset

_BUILT_IN = ("spade_model.data", "spade_model.networks")


@dataclass(frozen=True)
class DatasetSpec:
    """A data set is made of image files that `layout` finds, or it makes its items itself, with `create`."""

    defaults: DataConfig
    """The options of a run for which nothing but the data set is given; dataset_mode is filled in."""
    layout: Callable[[DataConfig, str], Layout] | None = None
    """`layout(config, split)` says where the files of a split are and how they pair."""
    create: Callable[..., SpadeDataset] | None = None
    """`create(config, split, need_images=...)`, a SpadeDataset class for example, makes items of `config.image_size`;
    the preprocess mode does not apply to them. Without need_images they do not need a photograph."""
    check: Callable[[DataConfig], None] | None = None
    """`check(config)` raises UserError for options that do not fit this data set."""
    folder_options: tuple[str, ...] = ("dataroot",)
    """The options that name its folders."""
    splits: tuple[str, ...] = ("train", "val")
    """The splits that have files of their own."""
    rgb_condition: bool = False
    """True if the condition can be RGB images instead of labels, with --label_nc 0."""
    byte_ids: bool = False
    """True if ids above 255 mean that an image is no label image of this data set."""
    ids_from_1: bool = False
    """True if id 0 means unknown, which --ade20k_shift takes into account."""

    def __post_init__(self) -> None:
        if (self.layout is None) == (self.create is None):
            raise ValueError("a DatasetSpec takes a layout or a create, and not both")


@dataclass(frozen=True)
class GeneratorSpec:
    """A generator is a network that makes an image of a condition: `network(segmap, z)`."""

    network: Callable[..., nn.Module]
    """Its class. Parameters of the constructor that are named like options, or properties, of DataConfig and
    ModelConfig get their values; others keep their defaults."""
    defaults: ModelConfig
    """The options of a run for which nothing but the generator is given; netG is filled in."""
    check: Callable[[DataConfig, ModelConfig, int], None]
    """`check(data, model, batch)` raises UserError if there is no such norm_G, if the network cannot make images of
    the size that `data` says, or if it cannot be trained with steps of `batch` images in all processes together."""


DATASETS: dict[str, DatasetSpec] = {}
GENERATORS: dict[str, GeneratorSpec] = {}


def load() -> None:
    """Imports the modules that register this package's own data sets and generators, which takes torch's import."""
    for module in _BUILT_IN:
        import_module(module)
