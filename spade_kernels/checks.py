"""Checks of operator arguments for the kernels written in Python; `csrc/checks.cpp` checks those of the compiled ones.

`check` raises RuntimeError for a tensor of the wrong dtype, rank, size or device, for one without memory, and for a
number outside its range; the message names the operator, the argument and what was expected.

Index tensors must hold valid indices. On a CPU their values are always compared with what they index, because that is
free beside the reads through them. On a GPU the host would have to wait for the values: there it happens only if the
environment variable SPADE_KERNELS_CHECK_INDICES is set to 1 before the package is imported, and not while a CUDA graph
is captured. The compiled kernels follow it, too.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from spade_kernels import transforms

_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_READS_ON_GPU = os.environ.get("SPADE_KERNELS_CHECK_INDICES") == "1"
_STATS_SCOPES = ("none", "image", "batch", "world")
# Any size but 0.
_ANY: Any = None
_PANEL_COLUMNS, _WINOGRAD_POINTS = 32, 16
# What a window index may hold: beyond it, memory runs out before an allocation fails.
_MOST_PIXELS, _MOST_ENTRIES, _MOST_IDS = 2**28, 2**31, 2**32

Shape = Sequence[Any]


def check(name: str, *arguments: Any, fake: bool = False) -> None:
    """Checks the arguments of one call of an operator.

    Args:
        name: of the operator, without its namespace.
        arguments: in the order of its schema.
        fake: the tensors have no values (fake or meta tensors), and sizes may be symbols. Those are not compared here
            but when the code that is compiled with them runs.

    Raises:
        RuntimeError: an argument does not fit.
    """
    _CHECKS[name](_Arguments(name, arguments[0].device, fake), *arguments)


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
        if shape[0] * sides[0] * sides[1] * kernel_size**2 > _MOST_ENTRIES:
            return f"the {kernel_size}x{kernel_size} windows of {sides[0]} x {sides[1]} pixels hold more than 2^31 ids"
    return None


def require_storage(name: str, t: Tensor) -> None:
    """Raises ValueError for a tensor whose storage was freed, which PyTorch's own operators would read."""
    # Traced and transformed tensors have no storage to ask; the operators they end in ask for themselves.
    if type(t) is not Tensor or torch.compiler.is_compiling() or transforms.are_active():
        return
    if not has_storage(t):
        raise ValueError(f"{name} has no memory: its storage was freed or resized")


def has_storage(t: Tensor) -> bool:
    """False for a tensor whose storage was freed or made smaller, as FSDP frees that of sharded parameters."""
    if not t.numel() or t.layout != torch.strided or t.is_meta:
        return True
    last = t.storage_offset() + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    return (last + 1) * t.element_size() <= t.untyped_storage().nbytes()


class _Arguments:
    """The arguments of one call; all tensors must be on one device."""

    def __init__(self, op: str, device: torch.device, fake: bool):
        self._op, self._device, self._fake = op, device, fake

    def fail(self, what: str) -> NoReturn:
        raise RuntimeError(f"spade_kernels.{self._op}: {what}")

    def require(self, holds: bool, what: str) -> None:
        if not holds:
            self.fail(what)

    def floats(self, name: str, t: Tensor | None, shape: Shape) -> None:
        if t is None:
            return
        if t.dtype not in _FLOATS:
            self.fail(f"{name} must be float16, bfloat16, float32 or float64, got {t.dtype}")
        self._tensor(name, t, shape)

    def index(self, name: str, t: Tensor, shape: Shape, low: int, high: int) -> None:
        """int64 of this shape, with values in low .. high - 1."""
        if t.dtype != torch.int64:
            self.fail(f"{name} must be int64, got {t.dtype}")
        self._tensor(name, t, shape)
        if not (self._reads_values(t) and t.numel()):
            return
        least, most = (int(value) for value in torch.aminmax(t))
        if least < low or most >= high:
            position = ((t < low) | (t >= high)).flatten().nonzero()[0].item()
            self.fail(
                f"{name} holds {t.flatten()[int(position)].item()} at position {position}; values must be at least "
                f"{low} and below {high}"
            )

    def bounds(self, name: str, t: Tensor, count: int, entries: int, exactly: bool = True) -> None:
        """The bounds of `count` segments of at most `entries` entries, or of exactly so many."""
        self.index(name, t, (count + 1,), 0, entries + 1)
        if not self._reads_values(t):
            return
        if t[0] != 0 or bool((t.diff() < 0).any()) or (exactly and t[-1] != entries):
            self.fail(f"{name} must increase from 0 to {entries}")

    def segments(self, indices: Tensor | None, offsets: Tensor | None, count: int, entries: int) -> None:
        """Entries in the order of their segments. The forward passes take them for their backward, and do without."""
        if indices is None or offsets is None:
            self.require(indices is offsets, "indices and offsets must be given together")
            return
        self.index("indices", indices, (entries,), 0, entries)
        self.bounds("offsets", offsets, count, entries)

    def integer(self, name: str, value: int, least: int, most: int) -> None:
        if not least <= value <= most:
            self.fail(f"{name} must be {least} to {most}, got {value}")

    def _reads_values(self, t: Tensor) -> bool:
        if self._fake or t.is_cpu:
            return not self._fake
        return _READS_ON_GPU and not torch.cuda.is_current_stream_capturing()

    def _tensor(self, name: str, t: Tensor, shape: Shape) -> None:
        if t.device != self._device:
            self.fail(f"{name} is on {t.device}, the first argument on {self._device}")
        if t.layout != torch.strided:
            self.fail(f"{name} must be a dense tensor, got {t.layout}")
        if t.dim() != len(shape) or any(map(_differs, t.shape, shape)):
            wanted = ", ".join("any" if size is _ANY else str(size) for size in shape)
            self.fail(f"{name} must have shape ({wanted}), got {tuple(t.shape)}")
        if not (self._fake or has_storage(t)):
            self.fail(f"{name} has no memory: its storage was freed or resized")


def _differs(size: Any, wanted: Any) -> bool:
    """False where a size is a symbol."""
    if wanted is _ANY:
        return isinstance(size, int) and size == 0
    return isinstance(size, int) and isinstance(wanted, int) and size != wanted


def _size(t: Tensor, dim: int) -> Any:
    return t.shape[dim] if dim < t.dim() else 0


def _window_index(a, ids, sizes, kernel_size, stride, padding, levels):
    a.index("ids", ids, (_ANY, _ANY, _ANY), 1, _MOST_IDS)
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


def _gather_sum(a, taps, bias, windows, indices, offsets, relu):
    a.floats("taps", taps, (_ANY, _ANY, _ANY))
    a.floats("bias", bias, (taps.shape[2],))
    a.index("windows", windows, (_size(windows, 0), taps.shape[1]), 0, taps.shape[0])
    a.segments(indices, offsets, taps.shape[0] * taps.shape[1], windows.numel())


def _gather_sum_grad(a, grad, rows, indices, offsets, num_taps, relu):
    a.integer("num_taps", num_taps, 1, _MOST_ENTRIES)
    a.floats("grad", grad, (_size(grad, 0), _ANY))
    a.floats("rows", rows, grad.shape)
    segments, entries = _size(offsets, 0) - 1, grad.shape[0] * num_taps
    if isinstance(segments, int):
        fits = segments > 0 and segments % num_taps == 0
        a.require(fits, "offsets must have one value more than a multiple of num_taps")
    a.index("indices", indices, (entries,), 0, entries)
    # A label map with room for more rows has some that belong to no image.
    a.bounds("offsets", offsets, segments, entries, exactly=False)


def _modulation_table(a, hidden, gamma, beta, bias, windows, packed_weight, indices, offsets):
    a.floats("hidden", hidden, (_size(hidden, 0), _ANY))
    taps = _check_weights(a, gamma, beta, hidden.shape[1])
    columns = 2 * gamma.shape[0]
    a.floats("bias", bias, (columns,))
    a.index("windows", windows, (_size(windows, 0), taps), 0, hidden.shape[0] + 1)
    a.floats("packed_weight", packed_weight, (_panels(columns), taps, hidden.shape[1], _PANEL_COLUMNS))
    a.segments(indices, offsets, (hidden.shape[0] + 1) * taps, windows.numel())


def _modulation_table_grad(a, grad, hidden, gamma, beta, indices, offsets):
    a.floats("hidden", hidden, (_size(hidden, 0), _ANY))
    taps = _check_weights(a, gamma, beta, hidden.shape[1])
    a.floats("grad", grad, (_size(grad, 0), 2 * gamma.shape[0]))
    a.segments(indices, offsets, (hidden.shape[0] + 1) * taps, grad.shape[0] * taps)


def _pack_modulation_weight(a, gamma, beta):
    _check_weights(a, gamma, beta, _ANY)


def _channel_stats(a, x):
    a.floats("x", x, (_ANY,) * 4)


def _channel_stats_grad(a, x, mean, grad_mean, grad_m2):
    a.floats("x", x, (_ANY,) * 4)
    for name, stats in (("mean", mean), ("grad_mean", grad_mean), ("grad_m2", grad_m2)):
        a.floats(name, stats, x.shape[:2])


def _modulate(
    a, x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, negative_slope, upsample, stats_scope
):
    _check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    if image_offsets is not None:
        a.bounds("image_offsets", image_offsets, x.shape[0], table.shape[0], exactly=False)
    if indices is not None or offsets is not None:
        a.require(pixel_row is not None, "indices and offsets are of pixel_row, which is not given")
    a.segments(indices, offsets, table.shape[0], 0 if pixel_row is None else pixel_row.numel())
    a.require(
        stats_scope in _STATS_SCOPES, f"stats_scope must be one of {', '.join(_STATS_SCOPES)}, got {stats_scope!r}"
    )


def _modulate_table_grad(a, grad, x, mean, rstd, table, pixel_row, indices, offsets, negative_slope, upsample):
    _check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    _check_grad_of_y(a, grad, x, upsample)
    together = (indices is None) == (pixel_row is None)
    a.require(together, "indices and offsets must be given with pixel_row, and only then")
    a.segments(indices, offsets, table.shape[0], 0 if pixel_row is None else pixel_row.numel())


def _modulate_input_grad(a, grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, negative_slope, upsample):
    _check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    _check_grad_of_y(a, grad, x, upsample)
    together = (mean_shift is None) == (mean_scale is None)
    a.require(together, "mean_shift and mean_scale must be given together")
    if mean_shift is not None:
        shape = _stats_shape(mean_shift, x)
        a.floats("mean_shift", mean_shift, shape)
        a.floats("mean_scale", mean_scale, shape)


def _pack_conv_weight(a, weight):
    side = 1 if _size(weight, 2) == 1 else 3
    a.floats("weight", weight, (_ANY, _ANY, side, side))


def _conv(a, x, packed_weight, bias, add, relu):
    a.floats("x", x, (_size(x, 0), _ANY, _ANY, _ANY))
    _check_packed(a, packed_weight, bias, add, x.shape)


def _conv3x3(a, x, weight, bias):
    a.floats("x", x, (_size(x, 0), _ANY, _ANY, _ANY))
    a.floats("weight", weight, (_ANY, x.shape[1], 3, 3))
    a.floats("bias", bias, weight.shape[:1])


def _conv3x3_input_grad(a, grad, weight):
    a.floats("grad", grad, (_size(grad, 0), _ANY, _ANY, _ANY))
    a.floats("weight", weight, (grad.shape[1], _ANY, 3, 3))


def _conv3x3_weight_grad(a, grad, x):
    a.floats("grad", grad, (_size(grad, 0), _ANY, _ANY, _ANY))
    a.floats("x", x, (grad.shape[0], _ANY, *grad.shape[2:]))


def _modulate_conv(a, x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add):
    _check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    images, channels, height, width = x.shape
    if isinstance(height, int) and isinstance(width, int):
        a.require(height > 0 and width > 0, "x holds no pixels")
    _check_packed(a, packed_weight, bias, add, (images, channels, upsample * height, upsample * width))


def _check_weights(a: _Arguments, gamma: Tensor, beta: Tensor, depth: Any) -> Any:
    """Weights (C, depth, k, k) of gamma and beta. Returns their number of taps."""
    a.floats("gamma", gamma, (_ANY, depth, _ANY, _ANY))
    a.floats("beta", beta, gamma.shape)
    return gamma.shape[2] * gamma.shape[3]


def _check_modulation(a, x, mean, rstd, table, pixel_row, upsample) -> None:
    """x, its statistics, the table and the rows that its pixels, or those of its upsampled result, take from it."""
    a.integer("upsample", upsample, 1, 2)
    a.require(x.dim() == 4, f"x must have shape (N, C, h, w), got {tuple(x.shape)}")
    images, channels, height, width = x.shape
    a.floats("x", x, (images, _ANY, height, width))
    shape = _stats_shape(mean, x)
    a.floats("mean", mean, shape)
    a.floats("rstd", rstd, shape)
    pixels = (images, upsample * height, upsample * width)
    rows = pixels[0] * pixels[1] * pixels[2] if pixel_row is None else _size(table, 0)
    a.floats("table", table, (rows, 2 * channels))
    if pixel_row is not None:
        a.index("pixel_row", pixel_row, pixels, 0, table.shape[0])


def _stats_shape(stats: Tensor, x: Tensor) -> tuple[Any, Any]:
    one = isinstance(_size(stats, 0), int) and _size(stats, 0) == 1
    return 1 if one else x.shape[0], x.shape[1]


def _check_grad_of_y(a, grad: Tensor, x: Tensor, upsample: int) -> None:
    a.floats("grad", grad, (*x.shape[:2], upsample * x.shape[2], upsample * x.shape[3]))


def _check_packed(a, packed_weight: Tensor, bias: Tensor, add: Tensor | None, shape: Shape) -> None:
    """Packed weights of a convolution whose input has this shape."""
    images, channels, height, width = shape
    a.floats("bias", bias, (_ANY,))
    out, points = bias.shape[0], 1 if _size(packed_weight, 0) == 1 else _WINOGRAD_POINTS
    a.floats("packed_weight", packed_weight, (points, _panels(out), channels, _PANEL_COLUMNS))
    a.floats("add", add, (images, out, height, width))


def _panels(columns: Any) -> Any:
    return (columns + _PANEL_COLUMNS - 1) // _PANEL_COLUMNS


_CHECKS: dict[str, Callable[..., None]] = {
    function.__name__.removeprefix("_"): function
    for function in (
        _window_index,
        _gather_sum,
        _gather_sum_grad,
        _modulation_table,
        _modulation_table_grad,
        _pack_modulation_weight,
        _channel_stats,
        _channel_stats_grad,
        _modulate,
        _modulate_table_grad,
        _modulate_input_grad,
        _pack_conv_weight,
        _conv,
        _conv3x3,
        _conv3x3_input_grad,
        _conv3x3_weight_grad,
        _modulate_conv,
    )
}
