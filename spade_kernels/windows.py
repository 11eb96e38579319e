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
        image_offsets: (N + 1,) int64, image n owns rows image_offsets[n] .. image_offsets[n + 1] - 1.
        num_ids: ids in use, 0 included.
    """

    windows: torch.Tensor
    pixel_row: torch.Tensor
    image_offsets: torch.Tensor
    num_ids: int
    _tap_segments: Segments | None = None
    _row_segments: Segments | None = None

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
        """A copy with `rows` rows and room for ids below `num_ids`; no pixel uses the rows added."""
        windows = torch.nn.functional.pad(self.windows, (0, 0, 0, rows - len(self)))
        return Windows(windows, self.pixel_row, self.image_offsets, num_ids)

    @property
    def tap_segments(self) -> Segments:
        """Uses of each (id, tap) pair, grouped for a deterministic segment sum. Built once, and cached."""
        if self._tap_segments is not None:
            return self._tap_segments
        with torch.inference_mode(False), transforms.outside():
            uses = ops.segments_by_tap(self.windows, self.num_ids)
        if not backends.is_captured(self.windows):
            self._tap_segments = uses
        return uses

    @property
    def row_segments(self) -> Segments:
        """Pixels of each row. Built once, and cached."""
        if self._row_segments is not None:
            return self._row_segments
        with torch.inference_mode(False), transforms.outside():
            pixels = ops.segments_by_value(self.pixel_row, self.windows.shape[0])
        if not backends.is_captured(self.windows):
            self._row_segments = pixels
        return pixels

    def segments(self) -> list[torch.Tensor]:
        """The tensors of those segments that are there."""
        return [*(self._tap_segments or ()), *(self._row_segments or ())]


def build_segments(by_tap: Iterable[Windows], by_pixel: Iterable[Windows]) -> None:
    """Builds `tap_segments` of some windows and `row_segments` of others, as far as they are not there, all at once."""
    by_tap = [windows for windows in by_tap if windows._tap_segments is None]
    by_pixel = [windows for windows in by_pixel if windows._row_segments is None]
    if any(backends.is_captured(windows.windows) for windows in [*by_tap, *by_pixel]):
        return
    values = [ops.tap_keys(windows.windows) for windows in by_tap] + [windows.pixel_row for windows in by_pixel]
    counts = [windows.windows.shape[1] * windows.num_ids for windows in by_tap] + [len(w) for w in by_pixel]
    with torch.inference_mode(False), transforms.outside():
        segments = ops.segments_of_each(values, counts)
    for windows, found in zip(by_tap, segments[: len(by_tap)], strict=True):
        windows._tap_segments = found
    for windows, found in zip(by_pixel, segments[len(by_tap) :], strict=True):
        windows._row_segments = found


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
        """Builds the index of codes (N, H, W) at each of the `sizes` (h, w)."""
        found = ops.window_index(codes, sizes, kernel_size, 1, kernel_size // 2, levels=2)
        hidden = [Windows(*level, num_codes) for level in found[::2]]
        # Not len(): where torch.export traces, the number of rows is a symbol.
        pairs = zip(hidden, found[1::2], strict=True)
        return [cls(of_codes, Windows(*level, of_codes.windows.shape[0] + 1)) for of_codes, level in pairs]

    def segments(self) -> tuple[Segments, Segments, Segments]:
        """Segments that the backward sums over: uses of codes, uses of hidden rows, pixels of modulation rows."""
        return self.hidden.tap_segments, self.modulation.tap_segments, self.modulation.row_segments
