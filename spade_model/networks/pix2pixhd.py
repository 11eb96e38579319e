"""The pix2pixHD global generator, SPADE's baseline."""

from __future__ import annotations

import torch
from torch import nn

from spade_kernels.condition import Segmap, as_condition
from spade_kernels.layers import as_planes, parameter_dtype
from spade_model.config import DataConfig, ModelConfig
from spade_model.errors import UserError
from spade_model.networks.check import has_one_size, pixels
from spade_model.networks.normalization import check_norm, normalized
from spade_model.registry import GeneratorSpec


class ResnetBlock(nn.Module):
    """Residual block of two reflection-padded convolutions."""

    def __init__(self, width: int, norm: str, kernel_size: int):
        super().__init__()
        padding = (kernel_size - 1) // 2
        self.conv_block = nn.Sequential(
            nn.ReflectionPad2d(padding),
            normalized(nn.Conv2d(width, width, kernel_size), norm),
            nn.ReLU(),
            nn.ReflectionPad2d(padding),
            normalized(nn.Conv2d(width, width, kernel_size), norm),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv_block(x)


class Pix2PixHDGenerator(nn.Module):
    """Downsamples the mask, as one-hot planes at full size, applies residual blocks, and upsamples the result.

    Args:
        semantic_nc: condition channels. ngf: width before downsampling.
        norm_G: [spectral]<none|instance|batch|syncbatch>.
        resnet_n_downsample: number of stride-2 convolutions. resnet_n_blocks: number of residual blocks.
        resnet_kernel_size: kernel size of the residual blocks.
        resnet_initial_kernel_size: kernel size of the first and last convolution.
        output_nc: image channels.
    """

    def __init__(
        self,
        semantic_nc: int,
        *,
        ngf: int = 64,
        norm_G: str = "spectralinstance",
        resnet_n_downsample: int = 4,
        resnet_n_blocks: int = 9,
        resnet_kernel_size: int = 3,
        resnet_initial_kernel_size: int = 7,
        output_nc: int = 3,
    ):
        super().__init__()
        self.semantic_nc = semantic_nc
        border = resnet_initial_kernel_size // 2
        # The blocks' input must be larger than their reflection padding, and have more than one pixel to normalize.
        in_blocks = max(1, resnet_kernel_size // 2)
        self._step = 2**resnet_n_downsample
        self.least_side = max(border, in_blocks * 2**resnet_n_downsample) + 1
        first = nn.Conv2d(semantic_nc, ngf, resnet_initial_kernel_size)
        layers: list[nn.Module] = [nn.ReflectionPad2d(border), normalized(first, norm_G), nn.ReLU()]
        width = ngf
        for _ in range(resnet_n_downsample):
            layers += [normalized(nn.Conv2d(width, width * 2, 3, stride=2, padding=1), norm_G), nn.ReLU()]
            width *= 2
        layers += [ResnetBlock(width, norm_G, resnet_kernel_size) for _ in range(resnet_n_blocks)]
        for _ in range(resnet_n_downsample):
            up = nn.ConvTranspose2d(width, width // 2, 3, stride=2, padding=1, output_padding=1)
            layers += [normalized(up, norm_G), nn.ReLU()]
            width //= 2
        layers += [nn.ReflectionPad2d(border), nn.Conv2d(width, output_nc, resnet_initial_kernel_size), nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the smallest image size (H, W) that the network can make and that is at least (height, width)."""
        return self._fitting_side(height), self._fitting_side(width)

    def _fitting_side(self, side: int) -> int:
        return -(-max(side, self.least_side) // self._step) * self._step

    def forward(self, segmap: Segmap, z: torch.Tensor | None = None) -> torch.Tensor:
        """Returns images (N, output_nc, H, W) in [-1, 1]. `z` is ignored; SPADEGenerator has the same signature.

        Raises:
            UserError: the mask is smaller than the padded convolutions need.
            TypeError, ValueError: the segmap is invalid (see `as_condition`).
        """
        segmap = as_condition(segmap, self.semantic_nc)
        height, width = segmap.shape[-2:]
        if min(height, width) < self.least_side:
            raise UserError(
                f"the mask is {width}x{height} pixels, but this generator needs at least {self.least_side} on each "
                "side; use larger images or --preprocess_mode fixed"
            )
        return self.model(as_planes(segmap, parameter_dtype([self], torch.float32)))


def _check(data: DataConfig, model: ModelConfig, batch: int) -> None:
    check_norm(model.norm_G, "--norm_G")
    for name in ("resnet_n_downsample", "resnet_n_blocks"):
        if getattr(model, name) < 0:
            raise UserError(f"--{name} {getattr(model, name)} is too small; it must be at least 0")
    for name in ("resnet_kernel_size", "resnet_initial_kernel_size"):
        if getattr(model, name) < 1 or getattr(model, name) % 2 == 0:
            raise UserError(f"--{name} {getattr(model, name)} must be an odd number: the kernel needs a middle")
    step = 2**model.resnet_n_downsample
    smallest = min(data.image_size) // step
    if has_one_size(data) and (any(side % step for side in data.image_size) or smallest < 2):
        raise UserError(
            f"images of {pixels(data.image_size)} do not fit --resnet_n_downsample {model.resnet_n_downsample}: "
            f"both sides must be multiples of {step}, at least {2 * step}; change --crop_size or --aspect_ratio"
        )
    for name, side in (("resnet_kernel_size", smallest), ("resnet_initial_kernel_size", min(data.image_size))):
        if getattr(model, name) // 2 >= side:
            raise UserError(
                f"--{name} {getattr(model, name)} is too large for its {side} pixels at --crop_size {data.crop_size}"
            )


PIX2PIXHD = GeneratorSpec(Pix2PixHDGenerator, ModelConfig(norm_G="instance"), _check)
