"""The multi-scale patch discriminator of pix2pixHD, as SPADE uses it (Park et al. 2019, appendix A, figure 13)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spade_kernels import LabelMap
from spade_kernels.condition import Segmap, as_condition, conv2d
from spade_kernels.convolution import runs_as
from spade_kernels.layers import as_planes
from spade_kernels.normalization import has_hooks
from spade_kernels.windows import build_segments
from spade_model.networks.encoder import require_images
from spade_model.networks.normalization import normalized

Features = list[torch.Tensor]

_FIRST = 4, 2, 2  # kernel size, stride and padding of the convolution that reads the mask


class NLayerDiscriminator(nn.Module):
    """The discriminator of one scale: n_layers_D 4x4 convolutions and an output convolution with one channel.

    Args:
        semantic_nc: condition channels. See `MultiscaleDiscriminator` for the others.
    """

    def __init__(self, semantic_nc: int, ndf: int, norm_D: str, n_layers_D: int, output_nc: int):
        super().__init__()
        self.semantic_nc = semantic_nc
        width = ndf
        self.model0 = nn.Sequential(
            nn.Conv2d(semantic_nc + output_nc, width, *_FIRST), nn.LeakyReLU(0.2, inplace=False)
        )
        self.depth = n_layers_D + 1
        for n in range(1, n_layers_D):
            before, width = width, min(width * 2, 512)
            stride = 1 if n == n_layers_D - 1 else 2
            layer = normalized(nn.Conv2d(before, width, 4, stride=stride, padding=2), norm_D)
            self.add_module(f"model{n}", nn.Sequential(layer, nn.LeakyReLU(0.2, inplace=False)))
        self.add_module(f"model{n_layers_D}", nn.Sequential(nn.Conv2d(width, 1, 4, padding=2)))

    def forward(self, segmap: Segmap, image: torch.Tensor) -> Features:
        """Returns the output of every layer; the last is the score of each patch, (N, 1, h, w)."""
        features = [self._first(segmap, image)]
        for n in range(1, self.depth):
            features.append(self.get_submodule(f"model{n}")(features[-1]))
        return features

    def _first(self, segmap: Segmap, image: torch.Tensor) -> torch.Tensor:
        """Applies model0 to mask and image.

        A label map is read without one-hot planes, unless model0 was hooked, wrapped or replaced.
        """
        first = _first_as_built(self.model0)
        if first is None:
            planes = as_planes(segmap, image.dtype)
            return self.model0(torch.cat((planes.repeat(len(image) // len(planes), 1, 1, 1), image), 1))
        on_segmap, on_image = first.weight.split((self.semantic_nc, image.shape[1]), 1)
        of_segmap = conv2d(segmap, on_segmap, first.bias, *_FIRST[1:])
        of_image = F.conv2d(image, on_image, None, *_FIRST[1:])
        return self.model0[1]((of_image.unflatten(0, (-1, len(of_segmap))) + of_segmap).flatten(0, 1))


def _first_as_built(model0: nn.Module) -> nn.Conv2d | None:
    """Returns the convolution of model0; None if model0 was hooked, wrapped or replaced and must be called as it is."""
    if type(model0) is not nn.Sequential or len(model0) != 2 or has_hooks(model0):
        return None
    first = model0[0]
    if not runs_as(first, nn.Conv2d):
        return None
    settings = first.kernel_size, first.stride, first.padding, first.dilation, first.groups, first.padding_mode
    return first if settings == (*((side, side) for side in _FIRST), (1, 1), 1, "zeros") else None


class MultiscaleDiscriminator(nn.Module):
    """Scores each patch of (mask, image) pairs at several scales.

    Args:
        semantic_nc: condition channels. ndf: channels of the first layer; they double with each layer, up to 512.
        norm_D: [spectral]<none|instance|batch|syncbatch> of the inner layers.
        num_D: number of scales, each at half the resolution of the previous one.
        n_layers_D: number of convolutions before the output convolution.
        output_nc: image channels.
    """

    def __init__(
        self,
        semantic_nc: int,
        *,
        ndf: int = 64,
        norm_D: str = "spectralinstance",
        num_D: int = 2,
        n_layers_D: int = 4,
        output_nc: int = 3,
    ):
        super().__init__()
        self.semantic_nc, self.num_D, self.output_nc = semantic_nc, num_D, output_nc
        for i in range(num_D):
            scale = NLayerDiscriminator(semantic_nc, ndf, norm_D, n_layers_D, output_nc)
            self.add_module(f"discriminator_{i}", scale)

    def forward(self, segmap: Segmap, image: torch.Tensor) -> list[Features]:
        """Returns for each scale the outputs of all layers, the score last.

        Args:
            segmap: LabelMap, integer label map (N, H, W), or float (N, semantic_nc, H, W), of the image's size.
            image: (N, output_nc, H, W), or (k * N, output_nc, H, W) for k batches that share the N masks: image i has
                mask i % N.

        Raises:
            TypeError, ValueError: the segmap (see `as_condition`) or the image does not fit.
        """
        require_images(image, self.output_nc)
        segmap = as_condition(segmap, self.semantic_nc)
        if not 0 < segmap.shape[0] <= len(image) or len(image) % segmap.shape[0]:
            raise ValueError(
                f"image holds {len(image)} images, not a multiple of the {segmap.shape[0]} masks in segmap"
            )
        segmap = as_condition(segmap, self.semantic_nc, like=image[: segmap.shape[0]])
        if tuple(segmap.shape[-2:]) != tuple(image.shape[-2:]):
            raise ValueError(
                f"segmap is {tuple(segmap.shape[-2:])} pixels, image {tuple(image.shape[-2:])}; they must match"
            )
        results = []
        for i in range(self.num_D):
            if i:
                segmap, image = _half(segmap), _half(image)
            results.append(self.get_submodule(f"discriminator_{i}")(segmap, image))
        return results


def build_windows(segmap: LabelMap, scales: int) -> None:
    """Builds the window indexes of a label map for training a `MultiscaleDiscriminator` with `scales` scales."""
    for scale in range(scales):
        segmap = segmap.avg_pool() if scale else segmap
        windows = [segmap.windows(segmap.shape[1:], *_FIRST)]
        build_segments(windows, windows)


def _half(condition):
    if isinstance(condition, LabelMap):
        return condition.avg_pool()
    return F.avg_pool2d(condition, 3, stride=2, padding=1, count_include_pad=False)
