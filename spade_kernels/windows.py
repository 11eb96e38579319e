"""The distinct windows of a map of ids: the integer half of a convolution."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from spade_kernels import backends, ops, transforms
from spade_kernels.packing import Packable

Segments = tuple[torch.Tensor, torch.Tensor]

# What is kept is made outside inference mode and torch.func's transforms even when asked for inside: training may need
# the same windows later. It is kept in plain attributes: torch.compile cannot trace the lock of a
# functools.cached_property.


@dataclass(eq=False)
class Windows(Packable):
    """The distinct k x k windows of a map of ids, and which of them every pixel sees.

    Attributes:
        windows: (rows, k*k) int64, the ids under each distinct window; 0 = outside the image.
        pixel_row: (N, h, w) int64, the row each pixel uses. Rows are numbered by first occurrence, image after image.
        image_rows: (N + 1,) int64, image n owns rows image_rows[n] .. image_rows[n + 1] - 1.
        num_ids: ids in use, 0 included.
    """

    windows: torch.Tensor
    pixel_row: torch.Tensor
    image_rows: torch.Tensor
    num_ids: int
    _uses_by_tap: Segments | None = None
    _row_pixels: Segments | None = None

    @classmethod
    def of(
        cls, ids: torch.Tensor, num_ids: int, size: Sequence[int], kernel_size: int, stride: int, padding: int
    ) -> Windows:
        """Windows of ids (N, H, W), all positive, after a nearest resize to `size`."""
        (found,) = ops.window_index(ids, [size], kernel_size, stride, padding)
        return cls(*found, num_ids)

    def __len__(self) -> int:
        return self.windows.shape[0]

    def padded(self, rows: int, num_ids: int) -> Windows:
        """The same with `rows` rows, those added seen by no pixel, and room for ids below `num_ids`."""
        windows = torch.nn.functional.pad(self.windows, (0, 0, 0, rows - len(self)))
        return Windows(windows, self.pixel_row, self.image_rows, num_ids)

    @property
    def uses_by_tap(self) -> Segments:
        """Uses of each (id, tap) pair, grouped for a deterministic segment sum. Built once, and kept."""
        if self._uses_by_tap is not None:
            return self._uses_by_tap
        with torch.inference_mode(False), transforms.outside():
            uses = ops.group_by_tap(self.windows, self.num_ids)
        if not backends.is_captured(self.windows):
            self._uses_by_tap = uses
        return uses

    @property
    def row_pixels(self) -> Segments:
        """Pixels of each row. Built once, and kept."""
        if self._row_pixels is not None:
            return self._row_pixels
        with torch.inference_mode(False), transforms.outside():
            pixels = ops.group_by_value(self.pixel_row, self.windows.shape[0])
        if not backends.is_captured(self.windows):
            self._row_pixels = pixels
        return pixels

    def segments(self) -> list[torch.Tensor]:
        """The tensors of those segments that are there."""
        return [*(self._uses_by_tap or ()), *(self._row_pixels or ())]


def build_segments(by_tap: Iterable[Windows], by_pixel: Iterable[Windows]) -> None:
    """Builds `uses_by_tap` of some windows and `row_pixels` of others, as far as they are not there, all at once."""
    by_tap = [windows for windows in by_tap if windows._uses_by_tap is None]
    by_pixel = [windows for windows in by_pixel if windows._row_pixels is None]
    if any(backends.is_captured(windows.windows) for windows in [*by_tap, *by_pixel]):
        return
    values = [ops.tap_uses(windows.windows) for windows in by_tap] + [windows.pixel_row for windows in by_pixel]
    counts = [windows.windows.shape[1] * windows.num_ids for windows in by_tap] + [len(w) for w in by_pixel]
    with torch.inference_mode(False), transforms.outside():
        segments = ops.group_each_by_value(values, counts)
    for windows, found in zip(by_tap, segments[: len(by_tap)], strict=True):
        windows._uses_by_tap = found
    for windows, found in zip(by_pixel, segments[len(by_tap) :], strict=True):
        windows._row_pixels = found


class WindowIndex(NamedTuple):
    """The two convolutions of a SPADE layer over one resolution of a label map.

    hidden: distinct windows of codes. modulation: distinct windows of hidden rows, counted from 1.
    """

    hidden: Windows
    modulation: Windows

    @classmethod
    def of(
        cls, codes: torch.Tensor, num_codes: int, sizes: Sequence[Sequence[int]], kernel_size: int
    ) -> list[WindowIndex]:
        """Of codes (N, H, W) at each of the `sizes` (h, w)."""
        found = ops.window_index(codes, sizes, kernel_size, 1, kernel_size // 2, levels=2)
        hidden = [Windows(*level, num_codes) for level in found[::2]]
        # Not len(): where torch.export traces, the number of rows is a symbol.
        pairs = zip(hidden, found[1::2], strict=True)
        return [cls(of_codes, Windows(*level, of_codes.windows.shape[0] + 1)) for of_codes, level in pairs]

    def groups(self) -> tuple[Segments, Segments, Segments]:
        """What the backward sums over: uses of codes, uses of hidden rows, pixels of modulation rows."""
        return self.hidden.uses_by_tap, self.modulation.uses_by_tap, self.modulation.row_pixels
