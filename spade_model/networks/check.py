"""Checks that networks can be built and trained with the options, before anything is built or loaded."""

from __future__ import annotations

from spade_model.config import DataConfig, ModelConfig
from spade_model.errors import UserError
from spade_model.networks.normalization import check_norm
from spade_model.registry import DATASETS, GENERATORS


def check_networks(data: DataConfig, model: ModelConfig, batch: int) -> None:
    """Checks the networks' options against each other and against the images' size.

    Args:
        batch: number of images per step over all processes.

    Raises:
        UserError: a norm does not exist, a size does not fit, or a normalization would get one value per channel, which
            has no variance. The message names the option.
    """
    check_generator(data, model, batch)
    if "instance" in model.norm_D and min(data.image_size) <= 2 ** (model.num_D - 1):
        raise UserError(
            f"--num_D {model.num_D} halves images of {pixels(data.image_size)} to one pixel, which --norm_D "
            f"{model.norm_D} cannot normalize; use fewer scales or a larger --crop_size"
        )


def check_generator(data: DataConfig, model: ModelConfig, batch: int) -> None:
    """Checks that the generator can be built and makes images of the data's size; part of `check_networks`."""
    GENERATORS[model.netG].check(data, model, batch)
    check_norm(model.norm_D, "--norm_D")
    check_norm(model.norm_E, "--norm_E")


def has_one_size(data: DataConfig) -> bool:
    """True if every training image has `data.image_size`, whatever the size of its files."""
    makes_items = DATASETS[data.dataset_mode].layout is None
    return makes_items or "crop" in data.preprocess_mode or data.preprocess_mode == "fixed"


def pixels(size: tuple[int, int]) -> str:
    """Formats a size (height, width) for a message."""
    return f"{size[1]}x{size[0]} pixels"
