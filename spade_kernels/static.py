"""Label maps at a fixed place in memory: what a CUDA graph reads."""

from __future__ import annotations

import torch

from spade_kernels.label_map import LabelMap
from spade_kernels.packing import pack, tensors, unpack
from spade_kernels.windows import Windows, build_segments

_FEWEST = 64


class StaticLabelMap:
    """A place for label maps of one shape, whose window indexes have room for more rows than the first one needs.

    A CUDA graph replays with the addresses and shapes it was captured with. Capture it with `label_map`, then fill in
    one label map after the other and replay. The rows to spare are used by no pixel; results are the same without.

    Args:
        example: there is room for the window indexes that it holds: `prepare` it, or run the network on it once, as it
            will be captured. Rows are rounded up by at most a quarter, 64 at the least.

    Attributes:
        label_map: what to give the network; on the example's device.
    """

    def __init__(self, example: LabelMap):
        self._buffer, self._layout = pack(_padded(example, None))
        self.label_map = unpack(self._buffer, self._layout)

    def copy_(self, other: LabelMap) -> LabelMap:
        """Puts another label map here, in one transfer, after building what its indexes lack. Returns `label_map`.

        Raises:
            ValueError: its size, classes or edges differ, or it has more distinct windows than there is room for.
            RuntimeError: the network has asked for an index that the example did not hold.
        """
        mine = self.label_map
        if _held(mine) != _held(self._layout):
            raise RuntimeError(
                "the network needed more of the label map than the example held, which has no fixed place; run the "
                "network on the example before making a StaticLabelMap of it"
            )
        for name in ("shape", "num_labels", "ignore_index", "is_pooled"):
            if getattr(mine, name) != getattr(other, name):
                raise ValueError(f"the label map has {name} {getattr(other, name)}, the place {getattr(mine, name)}")
        if (mine.edges is None) != (other.edges is None):
            raise ValueError("of the label map and the place, one has edges and one has not")
        padded = _padded(other, self._layout)
        if other.device == mine.device:
            _copy_each(tensors(mine), tensors(padded))
        else:
            buffer, _ = pack(padded, pinned=mine.device.type == "cuda")
            assert self._buffer is not None
            assert buffer is not None
            self._buffer.copy_(buffer, non_blocking=True)
        return mine


def _copy_each(to: list[torch.Tensor], values: list[torch.Tensor]) -> None:
    """Those of one dtype in one launch."""
    for dtype in {t.dtype for t in to}:
        same = [i for i, t in enumerate(to) if t.dtype == dtype]
        torch._foreach_copy_([to[i] for i in same], [values[i] for i in same])


def _held(label_map: LabelMap) -> dict:
    """Which window indexes it holds, and which segments of them."""
    return {
        key: isinstance(kept, Windows) and (kept._uses_by_tap is None, kept._row_pixels is None)
        for key, kept in label_map._kept.items()
    }


def _padded(label_map: LabelMap, like: LabelMap | None) -> LabelMap:
    """A twin with the window indexes of `like`, in their sizes; with its own, rounded up, where that is None."""
    if label_map.is_pooled:
        raise ValueError("a pooled label map has a codebook of its own; its graph could not serve another")
    twin = label_map._with_codes(label_map.codes, None)
    twin.labels = label_map.labels.long()  # The same layout whatever integers the labels came as.
    wanted = (like or label_map)._kept
    for kernel_size in {key[3] for key in wanted if key[0] == "hidden rows"}:
        sizes = [key[1:3] for key in wanted if key[0] == "hidden rows" and key[3] == kernel_size]
        label_map.prepare(sizes, kernel_size, gradients=False)
    models, made = [], []
    for key, windows in wanted.items():
        if not isinstance(windows, Windows):
            continue
        kind, height, width, kernel_size, *how = key
        if kind == "codes":
            found, num_ids = label_map.windows((height, width), kernel_size, *how), windows.num_ids
        else:
            hidden, found = label_map.window_index((height, width), kernel_size)
            num_ids = windows.num_ids if like else _bucket(len(hidden), hidden.pixel_row) + 1
        rows = len(windows) if like else _bucket(len(found), found.pixel_row)
        if len(found) > rows:
            raise ValueError(
                f"the label map has {len(found)} distinct {kernel_size}x{kernel_size} windows at {height} x {width}, "
                f"the place has room for {rows}; make a new StaticLabelMap of it"
            )
        twin._kept[key] = found.padded(rows, num_ids)
        models.append(windows)
        made.append(twin._kept[key])
    build_segments(
        [mine for mine, model in zip(made, models, strict=True) if model._uses_by_tap is not None],
        [mine for mine, model in zip(made, models, strict=True) if model._row_pixels is not None],
    )
    return twin


def _bucket(rows: int, pixel_row: torch.Tensor) -> int:
    step = max(_FEWEST, 1 << max(rows.bit_length() - 3, 0))
    return min(-(-rows // step) * step, pixel_row.numel())
