"""The style encoder (Park et al. 2019, appendix A, figure 14)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

from spade_model.networks.normalization import normalized


class ConvEncoder(nn.Module):
    """Encodes an image into mean and log variance of its style vector.

    Images are resized to 256 x 256, or to 128 x 128 with one convolution fewer when crop_size is below 256, so that
    the last feature map is 4 x 4 at any crop size.

    Args:
        ngf: width of the first layer. norm_E: [spectral]<none|instance|batch|syncbatch>.
        crop_size: width of the training images. z_dim: length of the style vector.
        output_nc: image channels.
    """

    def __init__(
        self,
        *,
        ngf: int = 64,
        norm_E: str = "spectralinstance",
        crop_size: int = 256,
        z_dim: int = 256,
        output_nc: int = 3,
    ):
        super().__init__()
        self.output_nc = output_nc
        widths = [ngf, ngf * 2, ngf * 4, ngf * 8, ngf * 8] + ([ngf * 8] if crop_size >= 256 else [])
        self.depth = len(widths)
        self.input_size = 4 * 2**self.depth
        before = output_nc
        for i, width in enumerate(widths, start=1):
            self.add_module(f"layer{i}", normalized(nn.Conv2d(before, width, 3, stride=2, padding=1), norm_E))
            before = width
        self.fc_mu = nn.Linear(before * 16, z_dim)
        self.fc_var = nn.Linear(before * 16, z_dim)

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encodes images, float (N, output_nc, H, W) in [-1, 1]; returns mu and logvar, each (N, z_dim).

        Raises ValueError for other shapes and integer dtypes.
        """
        require_images(image, self.output_nc)
        x = image
        if x.shape[2:] != (self.input_size, self.input_size):
            x = F.interpolate(x, size=(self.input_size, self.input_size), mode="bilinear")
        for i in range(1, self.depth + 1):
            x = self.get_submodule(f"layer{i}")(x if i == 1 else F.leaky_relu(x, 0.2))
        x = F.leaky_relu(x, 0.2).flatten(1)
        return self.fc_mu(x), self.fc_var(x)


def require_images(image: torch.Tensor, channels: int) -> None:
    """Raises ValueError unless the images are a float tensor (N, channels, H, W)."""
    if image.dim() != 4 or image.shape[1] != channels or not image.is_floating_point():
        raise ValueError(
            f"images must be a float tensor (N, {channels}, H, W), got {image.dtype} of shape {tuple(image.shape)}"
        )
