"""The distinct windows of a map of ids, and the segments for sums over them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch

from spade_kernels import backends, ops, transforms
from spade_kernels.cache import Cache
from spade_kernels.packing import Packable

Segments = tuple[torch.Tensor, torch.Tensor]


class WindowKey(NamedTuple):
    """Cache key of the windows of a label map's codes, or of its hidden rows (one per distinct window of codes)."""

    of: Literal["codes", "hidden rows"]
    height: int
    width: int
    kernel_size: int
    stride: int
    padding: int

    @property
    def size(self) -> tuple[int, int]:
        return self.height, self.width


@dataclass(eq=False)
class Windows(Packable):
    """The distinct k x k windows of a map of ids, and the window of every pixel.

    Attributes:
        windows: (rows, k*k) int64, the ids under each distinct window; 0 = outside the image.
        pixel_row: (N, h, w) int64, the row each pixel uses. Rows are numbered by first occurrence, image after image.
        image_offsets: (N + 1,) int64, image n owns rows image_offsets[n] .. image_offsets[n + 1] - 1.
        num_ids: number of ids, 0 included.
        cache: `tap_segments` and `row_segments`, under these names.
    """

    windows: torch.Tensor
    pixel_row: torch.Tensor
    image_offsets: torch.Tensor
    num_ids: int
    cache: Cache = field(init=False)

    def __post_init__(self) -> None:
        # Not a default_factory, which torch.compile does not trace.
        self.cache = Cache()

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
        """The uses of each (id, tap) pair, as segments for a deterministic sum. They are built once and cached."""
        return self.cache.get("tap_segments", lambda: ops.segments_by_tap(self.windows, self.num_ids), self.windows)

    @property
    def row_segments(self) -> Segments:
        """The pixels of each row, as segments. They are built once and cached."""
        count = self.windows.shape[0]
        return self.cache.get("row_segments", lambda: ops.segments_by_value(self.pixel_row, count), self.windows)


def build_segments(by_tap: Iterable[Windows], by_pixel: Iterable[Windows]) -> None:
    """Builds the missing `tap_segments` of `by_tap` and `row_segments` of `by_pixel`, all together."""
    by_tap = [windows for windows in by_tap if "tap_segments" not in windows.cache]
    by_pixel = [windows for windows in by_pixel if "row_segments" not in windows.cache]
    if any(backends.is_captured(windows.windows) for windows in [*by_tap, *by_pixel]):
        return
    values = [ops.tap_keys(windows.windows) for windows in by_tap] + [windows.pixel_row for windows in by_pixel]
    counts = [windows.windows.shape[1] * windows.num_ids for windows in by_tap] + [len(w) for w in by_pixel]
    with torch.inference_mode(False), transforms.outside():
        segments = ops.segments_of_each(values, counts)
    for windows, found in zip(by_tap, segments[: len(by_tap)], strict=True):
        windows.cache["tap_segments"] = found
    for windows, found in zip(by_pixel, segments[len(by_tap) :], strict=True):
        windows.cache["row_segments"] = found


class WindowIndex(NamedTuple):
    """The windows of a SPADE layer's two convolutions at one resolution of a label map.

    hidden: distinct windows of codes. modulation: distinct windows of hidden rows, which are counted from 1.
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
        # len() is not used, because the number of rows is a symbol where torch.export traces.
        pairs = zip(hidden, found[1::2], strict=True)
        return [cls(of_codes, Windows(*level, of_codes.windows.shape[0] + 1)) for of_codes, level in pairs]

    def segments(self) -> tuple[Segments, Segments, Segments]:
        """Segments that the backward sums over: uses of codes, uses of hidden rows, pixels of modulation rows."""
        return self.hidden.tap_segments, self.modulation.tap_segments, self.modulation.row_segments
