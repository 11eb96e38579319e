"""window_index: the distinct windows of maps of ids, and the window of every pixel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from spade_kernels.ops._arguments import MOST_ENTRIES, NOT_EMPTY
from spade_kernels.ops._register import call, operators, register

# Larger maps are refused: the process would run out of memory before an allocation fails.
_MOST_PIXELS, _MOST_IDS = 2**28, 2**32


def window_index(
    ids: Tensor, sizes: Sequence[Sequence[int]], kernel_size: int, stride: int, padding: int, levels: int = 1
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Distinct windows, the row of every pixel and the rows of every image: `reference.window_index`.

    There is one tuple for each of the `sizes` (h, w) and each of its levels.
    """
    flat = [side for size in sizes for side in size]
    found = call(operators.window_index, ids, flat, kernel_size, stride, padding, levels)
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def why_no_windows(
    shape: Sequence[int], size: Sequence[int], kernel_size: int, stride: int, padding: int, levels: int = 1
) -> str | None:
    """None, or the reason why maps of this shape have no window index.

    Args:
        shape: (N, H, W) of the maps. size: (h, w) to which they are resized.
        kernel_size, stride, padding, levels: see `reference.window_index`.
    """
    for name, value, least in (
        ("height", size[0], 1),
        ("width", size[1], 1),
        ("kernel_size", kernel_size, 1),
        ("stride", stride, 1),
        ("padding", padding, 0),
    ):
        if not least <= value <= _MOST_PIXELS:
            return f"{name} must be at least {least} and at most {_MOST_PIXELS}, got {value}"
    sides = list(size)
    for _ in range(levels):
        padded = [side + 2 * padding for side in sides]
        if min(padded) < kernel_size:
            return f"no {kernel_size}x{kernel_size} window fits size {tuple(size)} with padding {padding}"
        if shape[0] * padded[0] * padded[1] > _MOST_PIXELS:
            return f"{shape[0]} maps of {padded[0]} x {padded[1]} pixels, padding included, are more than 2^28 pixels"
        sides = [(side - kernel_size) // stride + 1 for side in padded]
        if shape[0] * sides[0] * sides[1] * kernel_size**2 > MOST_ENTRIES:
            return f"the {kernel_size}x{kernel_size} windows of {sides[0]} x {sides[1]} pixels hold more than 2^31 ids"
    return None


def _check(a, ids, sizes, kernel_size, stride, padding, levels):
    a.index("ids", ids, (NOT_EMPTY,) * 3, 1, _MOST_IDS)
    a.require(len(sizes) % 2 == 0, f"sizes must be pairs (h, w), got {len(sizes)} numbers")
    a.integer("kernel_size", kernel_size, 1, _MOST_PIXELS)
    a.integer("stride", stride, 1, _MOST_PIXELS)
    a.integer("padding", padding, 0, _MOST_PIXELS)
    a.integer("levels", levels, 1, 2)
    for size in zip(sizes[::2], sizes[1::2], strict=True):
        if not all(isinstance(side, int) for side in (*ids.shape, *size)):
            continue
        reason = why_no_windows(ids.shape, size, kernel_size, stride, padding, levels)
        if reason is not None:
            a.fail(reason)


def _fake(ids, sizes, kernel_size, stride, padding, levels):
    if type(ids) is Tensor:
        raise RuntimeError("spade_kernels.window_index: a tensor on the meta device has no windows to count")
    found = []
    for size in zip(sizes[::2], sizes[1::2], strict=True):
        for _ in range(levels):
            size = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in size)
            windows = ids.new_empty(torch.library.get_ctx().new_dynamic_size(), kernel_size**2)
            found += [windows, ids.new_empty(ids.shape[0], *size), ids.new_empty(ids.shape[0] + 1)]
    return found


register(
    "window_index(Tensor ids, SymInt[] sizes, int kernel_size, int stride, int padding, int levels) -> Tensor[]",
    check=_check,
    fake=_fake,
    kernels=("cuda", "cpu"),
)
