"""The SPADE generator (Park et al. 2019, appendix A, figure 11)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from spade_kernels import SPADE, LabelMap, freeze
from spade_kernels.condition import Segmap, as_condition, conv2d
from spade_kernels.convolution import Conv2d
from spade_kernels.layers import as_planes, keeps_size, parameter_dtype, spade_conv
from spade_kernels.normalization import moments
from spade_kernels.transforms import channels_last
from spade_model.config import DataConfig, ModelConfig
from spade_model.errors import UserError
from spade_model.networks.check import has_one_size, pixels
from spade_model.registry import GeneratorSpec

_NEGATIVE_SLOPE = 0.2
DOUBLINGS = {"normal": 5, "more": 6, "most": 7}
"""Number of times that the first feature map is doubled in size, for each `num_upsampling_layers`."""


class SPADEResnetBlock(nn.Module):
    """Residual block with two SPADE layers, and a third one in the shortcut if fin != fout.

    Its modules can be wrapped, hooked or replaced: the block then calls them as ordinary modules (see `spade_conv`).

    Args:
        fin, fout: channels in and out. norm_G: [spectral]spade<norm><k>x<k>. semantic_nc: condition channels.
    """

    def __init__(self, fin: int, fout: int, norm_G: str, semantic_nc: int):
        super().__init__()
        fmiddle = min(fin, fout)
        spectral = "spectral" in norm_G
        self.conv_0 = Conv2d(fin, fmiddle, 3, padding=1, spectral=spectral)
        self.conv_1 = Conv2d(fmiddle, fout, 3, padding=1, spectral=spectral)
        self.norm_0 = SPADE(norm_G, fin, semantic_nc)
        self.norm_1 = SPADE(norm_G, fmiddle, semantic_nc)
        self.learned_shortcut = fin != fout
        if self.learned_shortcut:
            self.conv_s = Conv2d(fin, fout, 1, bias=False, spectral=spectral)
            self.norm_s = SPADE(norm_G, fin, semantic_nc)

    def forward(self, x: torch.Tensor, segmap: Segmap, upsample: int = 1) -> torch.Tensor:
        """Maps (N, fin, h, w) to (N, fout, upsample * h, upsample * w).

        With `upsample` 2 the result is that of x after nearest-neighbour upsampling.
        """
        x = channels_last(x)
        taken = moments(self.norm_0.param_free_norm, x) if isinstance(self.norm_0, SPADE) else None
        common: dict[str, Any] = {"upsample": upsample, "moments": taken}
        if self.learned_shortcut:
            shortcut = spade_conv(self.conv_s, self.norm_s, x, segmap, **common)
        else:
            shortcut = _double(x) if upsample == 2 else x
        dx = spade_conv(self.conv_0, self.norm_0, x, segmap, _NEGATIVE_SLOPE, **common)
        return spade_conv(self.conv_1, self.norm_1, dx, segmap, _NEGATIVE_SLOPE, add=shortcut)


class SPADEGenerator(nn.Module):
    """Generates images from segmentation masks, and with `use_vae` also from style vectors.

    Args:
        semantic_nc: condition channels (classes, unknown class, instance edges).
        ngf: width; the first feature map has 16 * ngf channels.
        norm_G: [spectral]spade<norm><k>x<k> of all blocks.
        num_upsampling_layers: "normal", "more" or "most", for 5, 6 or 7 doublings; "most" also adds a block.
        crop_size: image width in pixels; aspect_ratio: width / height.
        use_vae: start from a style vector of length z_dim instead of the downsampled mask.
        output_nc: image channels.

    Raises:
        UserError: the image is too small for the doublings, or num_upsampling_layers is unknown.
    """

    def __init__(
        self,
        semantic_nc: int,
        *,
        ngf: int = 64,
        norm_G: str = "spectralspadesyncbatch3x3",
        num_upsampling_layers: str = "normal",
        crop_size: int = 256,
        aspect_ratio: float = 1.0,
        use_vae: bool = False,
        z_dim: int = 256,
        output_nc: int = 3,
    ):
        super().__init__()
        self.semantic_nc, self.use_vae, self.z_dim = semantic_nc, use_vae, z_dim
        self.num_upsampling_layers = num_upsampling_layers
        self.start_size = start_size(num_upsampling_layers, crop_size, aspect_ratio)
        height, width = self.start_size
        if use_vae:
            self.fc: nn.Module = nn.Linear(z_dim, 16 * ngf * height * width)
        else:
            self.fc = nn.Conv2d(semantic_nc, 16 * ngf, 3, padding=1)

        def block(fin: int, fout: int) -> SPADEResnetBlock:
            return SPADEResnetBlock(fin, fout, norm_G, semantic_nc)

        self.head_0 = block(16 * ngf, 16 * ngf)
        self.G_middle_0 = block(16 * ngf, 16 * ngf)
        self.G_middle_1 = block(16 * ngf, 16 * ngf)
        self.up_0 = block(16 * ngf, 8 * ngf)
        self.up_1 = block(8 * ngf, 4 * ngf)
        self.up_2 = block(4 * ngf, 2 * ngf)
        self.up_3 = block(2 * ngf, ngf)
        last = ngf
        if num_upsampling_layers == "most":
            self.up_4 = block(ngf, ngf // 2)
            last = ngf // 2
        self.conv_img = Conv2d(last, output_nc, 3, padding=1)
        self._least_pixels = 2 if "instance" in norm_G else 1
        self.kernel_size: int = self.head_0.norm_0.mlp_gamma.kernel_size[0]
        """Kernel size of the SPADE layers' convolutions at construction."""

    def forward(
        self, segmap: Segmap, z: torch.Tensor | None = None, *, size: tuple[int, int] | None = None
    ) -> torch.Tensor:
        """Returns images (N, output_nc, H, W) in [-1, 1].

        Args:
            segmap: LabelMap, integer label map (N, H, W), or float (N, semantic_nc, H, W); each layer
                resizes it to the size of its input.
            z: (N, z_dim) style vectors with `use_vae`; drawn from a standard normal when None.
            size: (H, W), one that `fitting_size` returns; by default the size at construction.

        Raises:
            TypeError, ValueError: the segmap (see `as_condition`), z or the size does not fit.
        """
        segmap = as_condition(segmap, self.semantic_nc)
        start = self.start_size if size is None else self._start_of(size)
        if isinstance(segmap, LabelMap):
            segmap.prepare(self._resolutions(start), self.kernel_size, gradients=False)
        x = self.head_0(self._start(segmap, z, start), segmap)
        x = self.G_middle_0(x, segmap, upsample=2)
        x = self.G_middle_1(x, segmap, upsample=1 if self.num_upsampling_layers == "normal" else 2)
        for block in (self.up_0, self.up_1, self.up_2, self.up_3):
            x = block(x, segmap, upsample=2)
        if self.num_upsampling_layers == "most":
            x = self.up_4(x, segmap, upsample=2)
        return self.conv_img(F.leaky_relu(x, _NEGATIVE_SLOPE)).tanh()

    def freeze(self) -> None:
        """Sets eval mode, folds spectral norm and packs weights. `train()` undoes it; see `spade_kernels.freeze`."""
        freeze(self)

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the smallest image size (H, W) that the network can make and that is at least (height, width).

        With `use_vae` the first layer fixes the size, which is returned whatever height and width are.
        """
        step = 2 ** DOUBLINGS[self.num_upsampling_layers]
        if self.use_vae:
            rows, columns = self.start_size
        else:
            rows, columns = -(-height // step), -(-width // step)
            # Instance norm has no variance of a single pixel.
            columns = max(columns, -(-self._least_pixels // rows))
        return rows * step, columns * step

    def _start_of(self, size: tuple[int, int]) -> tuple[int, int]:
        if self.fitting_size(*size) != tuple(size):
            raise ValueError(
                f"size must be one that fitting_size returns, such as {self.fitting_size(*size)}, got {size}"
            )
        step = 2 ** DOUBLINGS[self.num_upsampling_layers]
        return size[0] // step, size[1] // step

    def _start(self, segmap: Segmap, z: torch.Tensor | None, start: tuple[int, int]) -> torch.Tensor:
        if not self.use_vae:
            return self._downsampled(segmap, start)
        count = len(segmap)
        if z is None:
            z = torch.randn(count, self.z_dim, device=segmap.device)
        if z.shape != (count, self.z_dim) or not z.is_floating_point():
            raise ValueError(
                f"z must be a float tensor of shape {(count, self.z_dim)}, got {z.dtype} of shape {tuple(z.shape)}"
            )
        return self.fc(z).view(count, -1, *self.start_size)

    def _downsampled(self, segmap: Segmap, start: tuple[int, int]) -> torch.Tensor:
        if keeps_size(self.fc):
            padding = self.fc.kernel_size[0] // 2
            return conv2d(segmap, self.fc.weight, self.fc.bias, padding=padding, size=start)
        planes = as_planes(segmap, parameter_dtype([self.fc], torch.float32))
        return self.fc(F.interpolate(planes, start))

    def resolutions(self) -> list[tuple[int, int]]:
        """Returns (height, width) of every feature map that SPADE layers modulate, smallest first."""
        return self._resolutions(self.start_size)

    def _resolutions(self, start: tuple[int, int]) -> list[tuple[int, int]]:
        height, width = start
        return [(height << n, width << n) for n in range(DOUBLINGS[self.num_upsampling_layers] + 1)]


def start_size(num_upsampling_layers: str, crop_size: int, aspect_ratio: float) -> tuple[int, int]:
    """Returns (height, width) of the first feature map.

    Raises:
        UserError: num_upsampling_layers is unknown, or the image is too small for its doublings.
    """
    if num_upsampling_layers not in DOUBLINGS:
        raise UserError(f"num_upsampling_layers {num_upsampling_layers!r} is not one of {', '.join(DOUBLINGS)}")
    step = 2 ** DOUBLINGS[num_upsampling_layers]
    width = crop_size // step
    height = round(width / aspect_ratio) if aspect_ratio > 0 else 0
    if width < 1 or height < 1:
        raise UserError(
            f"--crop_size {crop_size} with --aspect_ratio {aspect_ratio} is too small for --num_upsampling_layers "
            f"{num_upsampling_layers}, which doubles {DOUBLINGS[num_upsampling_layers]} times; "
            f"both sides need at least {step} pixels"
        )
    return height, width


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


def _check(data: DataConfig, model: ModelConfig, batch: int) -> None:
    try:
        with torch.device("meta"):
            SPADE(model.norm_G, 1, 1)
    except ValueError as error:
        raise UserError(f"--norm_G {error}") from error
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
    if has_one_size(data) and made != data.image_size:
        raise UserError(
            f"--crop_size {data.crop_size} with --aspect_ratio {data.aspect_ratio} gives images of "
            f"{pixels(data.image_size)}, but the generator makes {pixels(made)}: with --num_upsampling_layers "
            f"{model.num_upsampling_layers} both sides must be multiples of {step}"
        )


SPADE_GENERATOR = GeneratorSpec(SPADEGenerator, ModelConfig(), _check)
