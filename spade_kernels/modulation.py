"""Modulation tables, and the modulation of a feature map by a table: at once, or fused into the next convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from spade_kernels import ops
from spade_kernels.normalization import Statistics


class ModulationTable(NamedTuple):
    """Scale and shift of every distinct window of a label map, or of every pixel of any condition.

    Attributes:
        rows: (R, 2C) float, the scale of C channels and then their shift. SPADE's scale is 1 + gamma.
        pixel_row: (N, h, w) int64, the row that each pixel takes; None if every pixel has a row of its own, in order.
        image_offsets: (N + 1,) int64; image n owns rows image_offsets[n] .. image_offsets[n + 1] - 1. None if every
            pixel has a row of its own.
        indices, offsets: the pixels of each row, as segments; None if every pixel has a row of its own, and where no
            gradient is recorded.
    """

    rows: Tensor
    pixel_row: Tensor | None = None
    image_offsets: Tensor | None = None
    indices: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def is_per_pixel(self) -> bool:
        return self.pixel_row is None

    def with_rows(self, rows: Tensor) -> ModulationTable:
        """Returns a table with other rows for the same pixels, for arithmetic on scale and shift.

        Such arithmetic runs on rows, which are far fewer than pixels, and PyTorch differentiates it as usual.
        """
        return ModulationTable(rows, *self[1:])

    def instance_normalized(self, images: int, eps: float) -> ModulationTable:
        """Returns the table whose columns are normalized over the pixels of each image, like `F.instance_norm` of maps.

        Args:
            images: N.
        """
        # Autocast would round the factors of the sums over rows.
        with torch.autocast(self.rows.device.type, enabled=False):
            return self.with_rows(self._instance_normalized(images, eps).to(self.rows.dtype))

    def _instance_normalized(self, images: int, eps: float) -> Tensor:
        rows = self.rows.to(torch.promote_types(self.rows.dtype, torch.float32))
        if self.pixel_row is None or self.image_offsets is None:
            maps = rows.view(images, -1, rows.shape[1])
            variance, mean = torch.var_mean(maps, 1, correction=0, keepdim=True)
            return ((maps - mean) * (variance + eps).rsqrt()).flatten(0, 1)
        flat = self.pixel_row.flatten()
        pixels = rows.new_zeros(len(rows)).scatter_add_(0, flat, torch.ones_like(flat, dtype=rows.dtype))
        every = torch.arange(len(rows), device=rows.device)
        image = (torch.searchsorted(self.image_offsets, every, right=True) - 1).clamp(max=images - 1)
        # (N, R): the share of each row in the pixels of its image.
        shares = rows.new_zeros(images, len(rows))
        shares[image, every] = pixels * (images / len(flat))
        # One image's statistics need no copy for each row.
        of_row = (lambda t: t) if images == 1 else (lambda t: t[image])
        centred = rows - of_row(shares @ rows)
        return centred * of_row((shares @ centred.square() + eps).rsqrt())


class DeferredModulation(NamedTuple):
    """The arguments of a `modulate` call that has not run yet, so that a convolution can fuse it."""

    x: Tensor
    stats: Statistics
    table: ModulationTable
    negative_slope: float
    upsample: int

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.x.shape
        return n, c, self.upsample * h, self.upsample * w

    def tensor(self) -> Tensor:
        """Runs the modulation, with a result (N, C, upsample * h, upsample * w)."""
        mean, rstd, stats_scope = self.stats
        return ops.modulate(self.x, mean, rstd, *self.table, self.negative_slope, self.upsample, stats_scope)


def modulate(
    x: Tensor, stats: Statistics, table: ModulationTable, *, negative_slope: float = 1.0, upsample: int = 1
) -> Tensor:
    """leaky_relu((x - mean) * rstd * scale + shift, negative_slope) in one pass over x.

    Args:
        x: (N, C, h, w) float.
        stats: statistics of x, from `statistics`, `normalization.instance_statistics` or your own norm.
        table: modulation table for the size (upsample * h, upsample * w), from `modulation_table`.
        negative_slope: slope of the leaky ReLU; 1 for none.
        upsample: 1, or 2 for nearest upsampling: every pixel of x stands for 2 x 2 pixels of the result.

    Returns:
        (N, C, upsample * h, upsample * w) in x's dtype, channels-last. Derivatives exist for x, including those through
        its statistics, and for the table's rows.

    Raises:
        RuntimeError: the arguments do not fit together; the message names which.
    """
    return DeferredModulation(x, stats, table, negative_slope, upsample).tensor()
