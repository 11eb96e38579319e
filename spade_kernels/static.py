"""Label maps at a fixed place in memory, for CUDA graphs."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from spade_kernels.label_map import LabelMap
from spade_kernels.packing import pack, unpack
from spade_kernels.windows import WindowKey, Windows, build_segments

_FEWEST = 64


class StaticLabelMap:
    """A fixed place for label maps of one shape, whose window indexes have spare rows.

    A CUDA graph replays with the addresses and shapes that it was captured with. Capture the network on `label_map`;
    then, for every mask, call `copy_` and replay. No pixel uses the spare rows, and results are the same as without
    them.

    Args:
        example: label map with the window indexes that need room: call its `prepare`, or run the network on it once in
            the way that will be captured. Numbers of rows are rounded up to multiples of 64, and large ones by at most
            a quarter.

    Attributes:
        label_map: the label map to call the network with; on the example's device.
    """

    def __init__(self, example: LabelMap):
        self.label_map = unpack(*pack(_with_room(example)))
        self._held = _held(self.label_map)

    def copy_(self, other: LabelMap) -> LabelMap:
        """Copies another label map, on any device, into `label_map`, and returns that.

        Window indexes that `other` lacks are built first.

        Raises:
            ValueError: `other` differs in size, classes or edges, or has more distinct windows than there is room for.
            RuntimeError: the network has asked for an index that the example did not hold.
        """
        mine = self.label_map
        if _held(mine) != self._held:
            raise RuntimeError(
                "the network has built window indexes, segments or a pooled label map that the example did not hold: "
                "these have no fixed place; run the network on the example before making a StaticLabelMap of it"
            )
        for name in ("shape", "num_labels", "ignore_index", "is_pooled"):
            if getattr(mine, name) != getattr(other, name):
                raise ValueError(f"the label map has {name} {getattr(other, name)}, the place {getattr(mine, name)}")
        if (mine.edges is None) != (other.edges is None):
            raise ValueError("the label map and the place differ: one has edges and one has not")
        # A copy to a CPU must not be asynchronous: nothing would wait for it.
        other = other.to(mine.device, non_blocking=mine.device.type == "cuda")
        places, found = [*_windows_of(mine).values()], _windows_like(mine, other)
        pairs = [(mine.codes, other.codes), (mine.labels, other.labels.long())]
        if mine.edges is not None and other.edges is not None:
            pairs.append((mine.edges, other.edges))
        for place, windows in zip(places, found, strict=True):
            # Spare rows are overwritten, too. No pixel uses them, but they affect where segment sums are cut into
            # pieces.
            pairs.append((place.windows, windows.padded(len(place), 0).windows))
            pairs += [(place.pixel_row, windows.pixel_row), (place.image_offsets, windows.image_offsets)]
        _copy_each(pairs)
        again = [Windows(place.windows, place.pixel_row, place.image_offsets, place.num_ids) for place in places]
        _build_segments_like(places, again)
        _copy_each(
            [
                pair
                for place, new in zip(places, again, strict=True)
                for name in place.cache
                for pair in zip(place.cache[name], new.cache[name], strict=True)
            ]
        )
        return mine


def _copy_each(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copies the second of each pair into the first; all pairs of one dtype take one launch."""
    for dtype in {to.dtype for to, _ in pairs}:
        same = [pair for pair in pairs if pair[0].dtype == dtype]
        torch._foreach_copy_([to for to, _ in same], [value for _, value in same])


def _held(label_map: LabelMap) -> dict:
    """The keys of a label map's cache; for window indexes, with the names of the segments that they hold."""
    return {key: isinstance(key, WindowKey) and set(label_map.cache[key].cache) for key in label_map.cache}


def _windows_of(label_map: LabelMap) -> dict[WindowKey, Windows]:
    return {key: label_map.cache[key] for key in label_map.cache if isinstance(key, WindowKey)}


def _build_segments_like(models: Sequence[Windows], made: Sequence[Windows]) -> None:
    """Builds, for each of `made`, the segments that its counterpart in `models` has."""
    pairs = list(zip(models, made, strict=True))
    build_segments(
        [windows for model, windows in pairs if "tap_segments" in model.cache],
        [windows for model, windows in pairs if "row_segments" in model.cache],
    )


def _windows_like(place: LabelMap, label_map: LabelMap) -> list[Windows]:
    """The windows of `label_map` that `place` has room for, built where they are missing.

    Raises:
        ValueError: `label_map` has more windows than `place` has room for.
    """
    mine = _windows_of(place)
    of_rows = [key for key in mine if key.of == "hidden rows"]
    for k in {key.kernel_size for key in of_rows}:
        label_map.prepare([key.size for key in of_rows if key.kernel_size == k], k, gradients=False)
    found = []
    for key, room in mine.items():
        k = key.kernel_size
        windows = (
            label_map.windows(key.size, k, key.stride, key.padding)
            if key.of == "codes"
            else label_map.window_index(key.size, k).modulation
        )
        if len(windows) > len(room):
            raise ValueError(
                f"the label map has {len(windows)} distinct {k}x{k} windows at {key.height} x {key.width}, the place "
                f"has room for {len(room)}; make a new StaticLabelMap of it"
            )
        found.append(windows)
    return found


def _with_room(example: LabelMap) -> LabelMap:
    """A copy whose window indexes have spare rows."""
    if example.is_pooled:
        raise ValueError("a pooled label map has a codebook of its own, so its graph could not serve another label map")
    twin = example._with_codes(example.codes, None)
    twin.labels = example.labels.long()  # int64, whatever integer dtype the labels had.
    for key, windows in _windows_of(example).items():
        num_ids = windows.num_ids
        if key.of == "hidden rows":
            num_ids = _bucket(example.window_index(key.size, key.kernel_size).hidden) + 1
        twin.cache[key] = windows.padded(_bucket(windows), num_ids)
    _build_segments_like([*_windows_of(example).values()], [*_windows_of(twin).values()])
    return twin


def _bucket(windows: Windows) -> int:
    rows = len(windows)
    step = max(_FEWEST, 1 << max(rows.bit_length() - 3, 0))
    return min(-(-rows // step) * step, windows.pixel_row.numel())
