"""Checks that networks can be built and trained with the options, before anything is built or loaded."""

from __future__ import annotations

import torch

from spade_kernels import SPADE
from spade_model.config import DataConfig, ModelConfig
from spade_model.errors import UserError
from spade_model.networks.generator import DOUBLINGS, start_size
from spade_model.networks.normalization import check_norm


def check_networks(data: DataConfig, model: ModelConfig, batch: int) -> None:
    """Checks the networks' options against each other and against the images' size.

    Args:
        batch: number of images per step over all processes.

    Raises:
        UserError: a norm does not exist, a size does not fit, or a normalization would get one value per channel, which
            has no variance. The message names the option.
    """
    check_norms(model)
    check_generator(data, model, batch)
    if "instance" in model.norm_D and min(data.image_size) <= 2 ** (model.num_D - 1):
        raise UserError(
            f"--num_D {model.num_D} halves images of {_pixels(data.image_size)} to one pixel, which --norm_D "
            f"{model.norm_D} cannot normalize; use fewer scales or a larger --crop_size"
        )


def check_generator(data: DataConfig, model: ModelConfig, batch: int) -> None:
    """Checks that the generator can be built and makes images of the data's size; part of `check_networks`."""
    if model.netG == "spade":
        _check_spade(data, model, batch)
    else:
        _check_pix2pixhd(data, model)


def check_norms(model: ModelConfig) -> None:
    """Raises UserError, naming the option, for a norm that does not exist."""
    if model.netG == "spade":
        try:
            with torch.device("meta"):
                SPADE(model.norm_G, 1, 1)
        except ValueError as error:
            raise UserError(f"--norm_G {error}") from error
    else:
        check_norm(model.norm_G, "--norm_G")
    check_norm(model.norm_D, "--norm_D")
    check_norm(model.norm_E, "--norm_E")


def _check_spade(data: DataConfig, model: ModelConfig, batch: int) -> None:
    if model.num_upsampling_layers == "most" and model.ngf < 2:
        raise UserError(f"--ngf {model.ngf} is too small for --num_upsampling_layers most, which halves it")
    height, width = start_size(model.num_upsampling_layers, data.crop_size, data.aspect_ratio)
    if height * width * (1 if "instance" in model.norm_G else batch) == 1:
        raise UserError(
            f"the first feature map has one pixel at --crop_size {data.crop_size}, which --norm_G {model.norm_G} "
            "cannot normalize; use a larger --crop_size, or a batch norm and a larger --batch_size"
        )
    step = 2 ** DOUBLINGS[model.num_upsampling_layers]
    made = height * step, width * step
    if _has_one_size(data) and made != data.image_size:
        raise UserError(
            f"--crop_size {data.crop_size} with --aspect_ratio {data.aspect_ratio} gives images of "
            f"{_pixels(data.image_size)}, but the generator makes {_pixels(made)}: with --num_upsampling_layers "
            f"{model.num_upsampling_layers} both sides must be multiples of {step}"
        )


def _check_pix2pixhd(data: DataConfig, model: ModelConfig) -> None:
    for name in ("resnet_n_downsample", "resnet_n_blocks"):
        if getattr(model, name) < 0:
            raise UserError(f"--{name} {getattr(model, name)} is too small; it must be at least 0")
    for name in ("resnet_kernel_size", "resnet_initial_kernel_size"):
        if getattr(model, name) < 1 or getattr(model, name) % 2 == 0:
            raise UserError(f"--{name} {getattr(model, name)} must be an odd number: the kernel needs a middle")
    step = 2**model.resnet_n_downsample
    smallest = min(data.image_size) // step
    if _has_one_size(data) and (any(side % step for side in data.image_size) or smallest < 2):
        raise UserError(
            f"images of {_pixels(data.image_size)} do not fit --resnet_n_downsample {model.resnet_n_downsample}: "
            f"both sides must be multiples of {step}, at least {2 * step}; change --crop_size or --aspect_ratio"
        )
    for name, side in (("resnet_kernel_size", smallest), ("resnet_initial_kernel_size", min(data.image_size))):
        if getattr(model, name) // 2 >= side:
            raise UserError(
                f"--{name} {getattr(model, name)} is too large for an input of {side} pixels, at --crop_size "
                f"{data.crop_size}"
            )


def _has_one_size(data: DataConfig) -> bool:
    """Returns True if preprocessing gives every training image the size `data.image_size`."""
    return data.dataset_mode == "toy" or "crop" in data.preprocess_mode or data.preprocess_mode == "fixed"


def _pixels(size: tuple[int, int]) -> str:
    return f"{size[1]}x{size[0]} pixels"
