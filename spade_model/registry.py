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
    """Describes a data set to the rest of the program.

    A data set of image files has a `layout`, which finds them; any other has `create`, which builds its Dataset.
    """

    defaults: DataConfig
    """The options' default values for this data set. The value of dataset_mode is replaced by the registered name."""
    layout: Callable[[DataConfig, str], Layout] | None = None
    """Called as `layout(config, split)`; returns the folders of the split's files and the rule that pairs the files."""
    create: Callable[..., SpadeDataset] | None = None
    """Called as `create(config, split, need_images=...)`; a subclass of SpadeDataset, for example. Its items have the
    size `config.image_size`, whatever the preprocess mode. Without need_images, they can be without a photograph."""
    check: Callable[[DataConfig], None] | None = None
    """Called as `check(config)`; raises UserError for options that do not fit this data set."""
    folder_options: tuple[str, ...] = ("dataroot",)
    """The names of the options that hold the data set's folders."""
    splits: tuple[str, ...] = ("train", "val")
    """The splits with files of their own, all of which `spade doctor` checks by default."""
    rgb_condition: bool = False
    """True if the condition can be RGB images instead of labels, with --label_nc 0."""
    byte_ids: bool = False
    """True if label images have 8-bit ids, so that a larger id shows that a file is not a label image."""
    class_names: tuple[str, ...] = ()
    """Names of its classes, in their order, for legends."""
    ids_from_1: bool = False
    """True if id 0 means unknown and classes begin at id 1; --ade20k_shift then converts the ids."""

    def __post_init__(self) -> None:
        if (self.layout is None) == (self.create is None):
            raise ValueError("a DatasetSpec takes a layout or a create: exactly one of the two")


@dataclass(frozen=True)
class GeneratorSpec:
    """Describes a generator to the rest of the program."""

    network: Callable[..., nn.Module]
    """The class of the network, which is called as `network(segmap, z)` and returns images. Constructor parameters that
    are named like an option or property of DataConfig or ModelConfig get its value; others keep their defaults."""
    defaults: ModelConfig
    """The options' default values for this generator. The value of netG is replaced by the registered name."""
    check: Callable[[DataConfig, ModelConfig, int], None]
    """Called as `check(data, model, batch)`; raises UserError if norm_G is unknown, if the network cannot make images
    of the size in `data`, or if it cannot be trained with `batch` images per step (the sum over all processes)."""


DATASETS: dict[str, DatasetSpec] = {}
GENERATORS: dict[str, GeneratorSpec] = {}


def load() -> None:
    """Imports the modules that register this package's own data sets and generators. They import torch."""
    for module in _BUILT_IN:
        import_module(module)
