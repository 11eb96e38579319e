"""The registered operators: schemas, fake kernels and autograd. Backends only add kernels.

Loading this module defines `torch.ops.spade_kernels.*` with the reference as the kernel of every device. The
functions here are the operators' Python names; their arguments and results are documented in `reference.py`.
Kernels give first derivatives in reverse mode, for every float argument but the statistics. All others (second
derivatives, forward mode, the transforms of torch.func) are those of `plain.py`, at plain PyTorch's cost; a raw
`torch.ops.spade_kernels` call has none in forward mode and torch.func. What stands still (`pack_modulation_weight`,
`pack_conv_weight`, `conv`, `modulate_conv`) has no derivatives.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from spade_kernels import backends, checks, plain, transforms

_library = torch.library.Library("spade_kernels", "DEF")

_SCHEMAS = {
    "window_index": "(Tensor ids, SymInt[] sizes, int kernel_size, int stride, int padding, int levels) -> Tensor[]",
    "gather_sum": "(Tensor taps, Tensor? bias, Tensor windows, Tensor? indices, Tensor? offsets, bool relu) -> Tensor",
    "gather_sum_grad": (
        "(Tensor grad, Tensor rows, Tensor indices, Tensor offsets, int num_taps, bool relu) -> (Tensor, Tensor)"
    ),
    "modulation_table": (
        "(Tensor hidden, Tensor gamma, Tensor beta, Tensor bias, Tensor windows, Tensor? packed_weight,"
        " Tensor? indices, Tensor? offsets) -> Tensor"
    ),
    "modulation_table_grad": (
        "(Tensor grad, Tensor hidden, Tensor gamma, Tensor beta, Tensor indices, Tensor offsets)"
        " -> (Tensor, Tensor, Tensor, Tensor)"
    ),
    "pack_modulation_weight": "(Tensor gamma, Tensor beta) -> Tensor",
    "channel_stats": "(Tensor x) -> (Tensor, Tensor)",
    "channel_stats_grad": "(Tensor x, Tensor mean, Tensor grad_mean, Tensor grad_m2) -> Tensor",
    "modulate": (
        "(Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, Tensor? image_offsets, Tensor? indices,"
        " Tensor? offsets, float negative_slope, int upsample, str stats_scope) -> Tensor"
    ),
    "modulate_table_grad": (
        "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, Tensor? indices,"
        " Tensor? offsets, float negative_slope, int upsample) -> Tensor"
    ),
    "modulate_input_grad": (
        "(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, Tensor? mean_shift,"
        " Tensor? mean_scale, float negative_slope, int upsample) -> Tensor"
    ),
    "pack_conv_weight": "(Tensor weight) -> Tensor",
    "conv": "(Tensor x, Tensor packed_weight, Tensor bias, Tensor? add, bool relu) -> Tensor",
    "conv3x3": "(Tensor x, Tensor weight, Tensor bias) -> Tensor",
    "conv3x3_input_grad": "(Tensor grad, Tensor weight) -> Tensor",
    "conv3x3_weight_grad": "(Tensor grad, Tensor x) -> (Tensor, Tensor)",
    "modulate_conv": (
        "(Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, float negative_slope, int upsample,"
        " Tensor packed_weight, Tensor bias, Tensor? add) -> Tensor"
    ),
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema)

_ops = torch.ops.spade_kernels
# Private to torch; without it every call passes through the Python that records gradients.
_below_autograd = getattr(torch._C, "_AutoDispatchBelowAutograd", contextlib.nullcontext)


def _call(op: Any, *arguments: Any) -> Any:
    """The operator's default overload, past its Python autograd layer where no gradient can be asked for."""
    if transforms.are_active() and op is not _ops.window_index:
        return _by_plain_torch(op.__name__, arguments)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return op.default(*arguments)
    with _below_autograd():
        return op.default(*arguments)


def _by_plain_torch(name: str, arguments: Sequence[Any]) -> Any:
    if name not in plain.__all__:
        raise _without_derivatives(name)
    # As in kernels: autocast would round the factors of float32 products.
    with torch.autocast(arguments[0].device.type, enabled=False):
        return getattr(plain, name)(*arguments)


def _without_derivatives(name: str) -> NotImplementedError:
    why = "differentiate the operator it belongs to" if name.endswith("_grad") else "it is for weights that stand still"
    return NotImplementedError(f"{name} has no derivatives and no torch.func transforms: {why}")


backends.register(_library, list(_SCHEMAS))


def segments_by_value(values: Tensor, num_values: int) -> tuple[Tensor, Tensor]:
    """(indices, offsets): positions in the flattened `values`, grouped by value 0 .. num_values - 1, ascending."""
    flat = values.flatten()
    return flat.argsort(stable=True), _segment_offsets(flat, num_values)


def _segment_offsets(flat: Tensor, num_values: int) -> Tensor:
    # Not bincount: on a GPU that asks the device for the largest value.
    return flat.new_zeros(num_values + 1).scatter_add_(0, flat + 1, torch.ones_like(flat)).cumsum(0)


def segments_of_each(values: Sequence[Tensor], num_values: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """`segments_by_value` of several tensors on one device; on a GPU at once, which takes a tenth of the launches."""
    if not values or not values[0].is_cuda:
        return [segments_by_value(*one) for one in zip(values, num_values, strict=True)]
    return segments_at_once(values, num_values)


def segments_at_once(values: Sequence[Tensor], num_values: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """`segments_of_each`: as the groups of one tensor, in which the values of each have numbers of their own."""
    lengths = [value.numel() for value in values]
    first_value, first_entry = ([0, *accumulate(counts)] for counts in (num_values, lengths))
    own = torch._foreach_add([value.flatten() for value in values], first_value[:-1])
    keys = torch.cat(own)
    # Of half the width in half the passes.
    indices = (keys.int() if first_value[-1] < 2**31 else keys).argsort(stable=True)
    offsets = _segment_offsets(keys, first_value[-1])
    all_indices = torch._foreach_sub(indices.split(lengths), first_entry[:-1])
    bounds = [offsets[first : first + count + 1] for first, count in zip(first_value[:-1], num_values, strict=True)]
    return list(zip(all_indices, torch._foreach_sub(bounds, first_entry[:-1]), strict=True))


def tap_keys(windows: Tensor) -> Tensor:
    """id * T + tap of every use of an id by windows (rows, T): what `segments_by_tap` groups."""
    taps = windows.shape[1]
    return torch.add(torch.arange(taps, device=windows.device), windows, alpha=taps)


def segments_by_tap(windows: Tensor, num_ids: int) -> tuple[Tensor, Tensor]:
    """(indices, offsets): uses of each (id, tap) pair by windows (rows, T), grouped by id * T + tap."""
    return segments_by_value(tap_keys(windows), windows.shape[1] * num_ids)


def window_index(
    ids: Tensor, sizes: Sequence[Sequence[int]], kernel_size: int, stride: int, padding: int, levels: int = 1
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Distinct windows, the row of every pixel and the rows of every image: `reference.window_index`.

    For each of the `sizes` (h, w), and each level of it.
    """
    flat = [side for size in sizes for side in size]
    found = _call(_ops.window_index, ids, flat, kernel_size, stride, padding, levels)
    return list(zip(found[::3], found[1::3], found[2::3], strict=True))


def gather_sum(
    taps: Tensor, bias: Tensor | None, windows: Tensor, indices: Tensor | None, offsets: Tensor | None, relu: bool
) -> Tensor:
    """The first convolution at every distinct window: `reference.gather_sum`."""
    return _call(_ops.gather_sum, taps, bias, windows, indices, offsets, relu)


def modulation_table(
    hidden: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    windows: Tensor,
    packed_weight: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Scale and shift of every distinct window: `reference.modulation_table`."""
    return _call(_ops.modulation_table, hidden, gamma, beta, bias, windows, packed_weight, indices, offsets)


def pack_modulation_weight(gamma: Tensor, beta: Tensor) -> Tensor:
    """Packs weights for `modulation_table`: `reference.pack_modulation_weight`. Not differentiable."""
    return _call(_ops.pack_modulation_weight, gamma, beta)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and sum of squared deviations of every image and channel: `reference.channel_stats`."""
    return _call(_ops.channel_stats, x)


def modulate(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None = None,
    image_offsets: Tensor | None = None,
    indices: Tensor | None = None,
    offsets: Tensor | None = None,
    negative_slope: float = 1.0,
    upsample: int = 1,
    stats_scope: str = "none",
) -> Tensor:
    """Normalize, modulate and activate x: `reference.modulate`.

    Args:
        image_offsets, indices, offsets: of the window index; needed by the backward only.
        stats_scope: what mean and rstd were computed from, so that the gradient of x includes them: "none" (constants),
            "image" (each image), "batch" (this process's batch), "world" (all processes' batches). Pass them detached:
            a gradient for mean and rstd themselves raises.
    """
    return _call(
        _ops.modulate,
        x,
        mean,
        rstd,
        table,
        pixel_row,
        image_offsets,
        indices,
        offsets,
        negative_slope,
        upsample,
        stats_scope,
    )


class DeferredModulation(NamedTuple):
    """A deferred `modulate`: its arguments only, so that a convolution can fuse it."""

    x: Tensor
    mean: Tensor
    rstd: Tensor
    table: Tensor
    pixel_row: Tensor | None
    image_offsets: Tensor | None
    indices: Tensor | None
    offsets: Tensor | None
    negative_slope: float
    upsample: int
    stats_scope: str

    @property
    def shape(self) -> tuple[int, int, int, int]:
        n, c, h, w = self.x.shape
        return n, c, self.upsample * h, self.upsample * w

    def tensor(self) -> Tensor:
        """(N, C, upsample * h, upsample * w)."""
        return modulate(*self)


def pack_conv_weight(weight: Tensor) -> Tensor:
    """Packs a weight for `conv` and `modulate_conv`: `reference.pack_conv_weight`. Not differentiable."""
    return _call(_ops.pack_conv_weight, weight)


def conv(x: Tensor, packed_weight: Tensor, bias: Tensor, add: Tensor | None = None, relu: bool = False) -> Tensor:
    """A convolution whose weights stand still: `reference.conv`. No derivatives."""
    return _call(_ops.conv, x, packed_weight, bias, add, relu)


def modulate_conv(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    negative_slope: float,
    upsample: int,
    packed_weight: Tensor,
    bias: Tensor,
    add: Tensor | None = None,
) -> Tensor:
    """`conv` of what `modulate` makes of x: `reference.modulate_conv`. No derivatives."""
    return _call(
        _ops.modulate_conv, x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3 x 3 convolution with padding 1: `reference.conv3x3`."""
    return _call(_ops.conv3x3, x, weight, bias)


def _accumulation_dtype(t: Tensor) -> torch.dtype:
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def _fake(name: str):
    def register(fake):
        @functools.wraps(fake)
        def checked(*arguments):
            checks.check(name, *arguments, fake=True)
            return fake(*arguments)

        return torch.library.register_fake(f"spade_kernels::{name}", checked, lib=_library)

    return register


@_fake("window_index")
def _(ids, sizes, kernel_size, stride, padding, levels):
    if type(ids) is Tensor:
        raise RuntimeError("spade_kernels.window_index: a tensor on the meta device has no windows to count")
    found = []
    for size in zip(sizes[::2], sizes[1::2], strict=True):
        for _ in range(levels):
            size = tuple((side + 2 * padding - kernel_size) // stride + 1 for side in size)
            windows = ids.new_empty(torch.library.get_ctx().new_dynamic_size(), kernel_size**2)
            found += [windows, ids.new_empty(ids.shape[0], *size), ids.new_empty(ids.shape[0] + 1)]
    return found


@_fake("gather_sum")
def _(taps, bias, windows, indices, offsets, relu):
    return taps.new_empty(windows.shape[0], taps.shape[2])


@_fake("gather_sum_grad")
def _(grad, rows, indices, offsets, num_taps, relu):
    acc = _accumulation_dtype(grad)
    codes = (offsets.shape[0] - 1) // num_taps
    return grad.new_empty(codes, num_taps, grad.shape[1], dtype=acc), grad.new_empty(grad.shape[1], dtype=acc)


@_fake("modulation_table")
def _(hidden, gamma, beta, bias, windows, packed_weight, indices, offsets):
    return hidden.new_empty(windows.shape[0], bias.shape[0])


@_fake("modulation_table_grad")
def _(grad, hidden, gamma, beta, indices, offsets):
    acc = _accumulation_dtype(grad)
    return tuple(grad.new_empty(shape, dtype=acc) for shape in (hidden.shape, gamma.shape, beta.shape, grad.shape[1:]))


@_fake("pack_modulation_weight")
def _(gamma, beta):
    channels, depth, height, width = gamma.shape
    panels = (2 * channels + 31) // 32
    if gamma.is_cuda:
        return gamma.new_empty(panels, 32, height * width, depth).permute(0, 2, 3, 1)
    return gamma.new_empty(panels, height * width, depth, 32, dtype=_accumulation_dtype(gamma))


@_fake("channel_stats")
def _(x):
    stats = x.new_empty(x.shape[:2], dtype=_accumulation_dtype(x))
    return stats, torch.empty_like(stats)


@_fake("channel_stats_grad")
def _(x, mean, grad_mean, grad_m2):
    return torch.empty_like(x)


@_fake("modulate")
def _(x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, negative_slope, upsample, stats_scope):
    return _channels_last_like(x, upsample)


@_fake("modulate_table_grad")
def _(grad, x, mean, rstd, table, pixel_row, indices, offsets, negative_slope, upsample):
    return table.new_empty(table.shape, dtype=_accumulation_dtype(x))


@_fake("modulate_input_grad")
def _(grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, negative_slope, upsample):
    return _channels_last_like(x)


@_fake("pack_conv_weight")
def _(weight):
    out, channels, height, width = weight.shape
    points = 1 if height * width == 1 else 16
    return weight.new_empty(points, (out + 31) // 32, channels, 32, dtype=_accumulation_dtype(weight))


@_fake("conv")
def _(x, packed_weight, bias, add, relu):
    return _channels_last_like(x, channels=bias.shape[0])


@_fake("conv3x3")
def _(x, weight, bias):
    return _channels_last_like(x, channels=bias.shape[0])


@_fake("conv3x3_input_grad")
def _(grad, weight):
    return _channels_last_like(grad, channels=weight.shape[1])


@_fake("conv3x3_weight_grad")
def _(grad, x):
    acc = _accumulation_dtype(grad)
    return grad.new_empty(grad.shape[1], x.shape[1], 3, 3, dtype=acc), grad.new_empty(grad.shape[1], dtype=acc)


@_fake("modulate_conv")
def _(x, mean, rstd, table, pixel_row, negative_slope, upsample, packed_weight, bias, add):
    return _channels_last_like(x, upsample, bias.shape[0])


def _channels_last_like(x: Tensor, upsample: int = 1, channels: int | None = None) -> Tensor:
    n, c, h, w = x.shape
    return x.new_empty(n, upsample * h, upsample * w, c if channels is None else channels).permute(0, 3, 1, 2)


def _autograd(name: str, setup_context, backward) -> None:
    torch.library.register_autograd(f"spade_kernels::{name}", backward, setup_context=setup_context, lib=_library)


def _refuse(name: str) -> None:
    def backward(ctx: Any, *grads: Any):
        raise _without_derivatives(name)

    _autograd(name, lambda ctx, inputs, output: None, backward)


for _name in (
    *("pack_modulation_weight", "pack_conv_weight", "conv", "modulate_conv"),
    *(name for name in _SCHEMAS if name.endswith("_grad")),
):
    _refuse(_name)


def _plain_gradients(
    name: str, arguments: Sequence[Any], needed: Sequence[bool], grads: Sequence[Tensor]
) -> tuple[Tensor | None, ...]:
    """The gradients of an operator's arguments, where needed, by plain PyTorch, which can differentiate them again.

    For a backward that runs with gradients enabled: it is to be differentiated itself.
    """
    # By other names: one argument may have been made from another, which is none of this operator's gradient.
    inputs = [a.view_as(a) if isinstance(a, Tensor) else a for a in arguments]
    wanted = [a for a, needs in zip(inputs, needed, strict=True) if needs]
    found = iter(torch.autograd.grad(_by_plain_torch(name, inputs), wanted, grads, create_graph=True))
    return tuple(next(found) if needs else None for needs in needed)


def _stand_in(shape: Sequence[int], dtype: torch.dtype | None, like: Tensor) -> Tensor | None:
    """For an argument on whose values no gradient depends, and which was therefore not saved; None for none."""
    if dtype is None:
        return None
    with transforms.outside():
        return torch.zeros(shape, dtype=dtype, device=like.device, requires_grad=True)


def _gather_sum_setup(ctx, inputs, output):
    taps, bias, windows, indices, offsets, ctx.relu = inputs
    ctx.shape, ctx.dtype, ctx.bias_dtype = taps.shape, taps.dtype, None if bias is None else bias.dtype
    ctx.save_for_backward(output, windows, indices, offsets)


def _gather_sum_backward(ctx, grad):
    rows, windows, indices, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        grad = grad * (rows > 0) if ctx.relu else grad
        # Without its ReLU the operator is linear.
        floats = _stand_in(ctx.shape, ctx.dtype, rows), _stand_in(ctx.shape[2:], ctx.bias_dtype, rows)
        arguments = (*floats, windows, indices, offsets, False)
        return _plain_gradients("gather_sum", arguments, ctx.needs_input_grad, (grad,))
    _require_groups("gather_sum", indices, offsets)
    taps, bias = _ops.gather_sum_grad(grad, rows, indices, offsets, ctx.shape[1], ctx.relu)
    return taps.to(ctx.dtype), None if ctx.bias_dtype is None else bias.to(ctx.bias_dtype), None, None, None, None


_autograd("gather_sum", _gather_sum_setup, _gather_sum_backward)


def _modulation_table_setup(ctx, inputs, output):
    hidden, gamma, beta, bias, windows, _, indices, offsets = inputs
    ctx.bias_dtype = bias.dtype
    ctx.save_for_backward(hidden, gamma, beta, windows, indices, offsets)


def _modulation_table_backward(ctx, grad):
    hidden, gamma, beta, windows, indices, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        bias = _stand_in(grad.shape[1:], ctx.bias_dtype, hidden)
        arguments = (hidden, gamma, beta, bias, windows, None, indices, offsets)
        return _plain_gradients("modulation_table", arguments, ctx.needs_input_grad, (grad,))
    _require_groups("modulation_table", indices, offsets)
    d_hidden, d_gamma, d_beta, d_bias = _ops.modulation_table_grad(grad, hidden, gamma, beta, indices, offsets)
    d_weights = d_gamma.to(gamma.dtype), d_beta.to(beta.dtype), d_bias.to(ctx.bias_dtype)
    return d_hidden.to(hidden.dtype), *d_weights, None, None, None, None


_autograd("modulation_table", _modulation_table_setup, _modulation_table_backward)


def _channel_stats_setup(ctx, inputs, output):
    ctx.save_for_backward(inputs[0], output[0])


def _channel_stats_backward(ctx, grad_mean, grad_m2):
    if torch.is_grad_enabled():
        (d_x,) = _plain_gradients("channel_stats", ctx.saved_tensors[:1], (True,), (grad_mean, grad_m2))
        return d_x
    return _ops.channel_stats_grad(*ctx.saved_tensors, grad_mean, grad_m2)


_autograd("channel_stats", _channel_stats_setup, _channel_stats_backward)


def _modulate_setup(ctx, inputs, output):
    (
        x,
        mean,
        rstd,
        table,
        pixel_row,
        image_offsets,
        indices,
        offsets,
        ctx.negative_slope,
        ctx.upsample,
        ctx.stats_scope,
    ) = inputs
    ctx.save_for_backward(x, mean, rstd, table, pixel_row, image_offsets, indices, offsets)


def _modulate_backward(ctx, grad):
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("modulate: mean and rstd must be detached; stats_scope says how they depend on x")
    # Unpacked once: a second time would have activation checkpointing compute the layer again, which it refuses.
    tensors = ctx.saved_tensors
    x, mean, rstd, table, pixel_row, image_offsets, indices, offsets = tensors
    how = (ctx.negative_slope, ctx.upsample)
    if torch.is_grad_enabled():
        arguments = (*tensors, *how, ctx.stats_scope)
        return _plain_gradients("modulate", arguments, ctx.needs_input_grad, (grad,))
    if pixel_row is not None:
        _require_groups("modulate", indices, offsets)
    d_table = _ops.modulate_table_grad(grad, x, mean, rstd, table, pixel_row, indices, offsets, *how)
    d_x = None
    if ctx.needs_input_grad[0]:
        means = _normalization_means(ctx.stats_scope, grad, table, d_table, image_offsets)
        d_x = _ops.modulate_input_grad(grad, x, mean, rstd, table, pixel_row, *means, *how)
    return d_x, None, None, d_table.to(table.dtype), None, None, None, None, None, None, None


_autograd("modulate", _modulate_setup, _modulate_backward)


def _conv3x3_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:2])
    ctx.bias_dtype = inputs[2].dtype


def _conv3x3_backward(ctx, grad):
    x, weight = ctx.saved_tensors
    if torch.is_grad_enabled():
        arguments = (x, weight, _stand_in(weight.shape[:1], ctx.bias_dtype, weight))
        return _plain_gradients("conv3x3", arguments, ctx.needs_input_grad, (grad,))
    d_x, d_weight, d_bias = None, None, None
    if ctx.needs_input_grad[0]:
        d_x = _ops.conv3x3_input_grad(grad, weight).to(x.dtype)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        d_weight, d_bias = _ops.conv3x3_weight_grad(grad, x)
        d_weight, d_bias = d_weight.to(weight.dtype), d_bias.to(ctx.bias_dtype)
    return d_x, d_weight, d_bias


_autograd("conv3x3", _conv3x3_setup, _conv3x3_backward)


def _normalization_means(
    stats_scope: str, grad: Tensor, table: Tensor, d_table: Tensor, image_offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Means of d(xhat) and d(xhat) * xhat over the pixels of y that the statistics cover, from the table alone.

    Every pixel of a row has the row's scale, so sum(scale * dy) over pixels is sum(scale * d_shift) over rows.
    """
    if stats_scope == "none":
        return None, None
    images, channels, pixels = grad.shape[0], grad.shape[1], grad.shape[2] * grad.shape[3]
    # In few and plain operations: on a GPU most of them take the time of their launch.
    products = (d_table.view(-1, 2, channels) * table[:, :channels].unsqueeze(1)).view(-1, 2 * channels)
    if stats_scope == "batch":
        means = products.sum(0, keepdim=True) / (images * pixels)
    elif stats_scope == "world":
        count = products.new_full((1, 1), images * pixels)
        sums = torch.cat((products.sum(0, keepdim=True), count), 1)
        dist.all_reduce(sums)
        means = sums[:, :-1] / sums[:, -1:]
    elif image_offsets is None:
        means = products.view(images, pixels, -1).sum(1) / pixels
    else:
        every = torch.arange(len(products), device=products.device)
        means = _ops.gather_sum_grad(products, products, every, image_offsets, 1, False)[0].view(images, -1) / pixels
    of_scale, of_shift = means.split(channels, 1)
    return of_shift, of_scale


def _require_groups(name: str, indices: Tensor | None, offsets: Tensor | None) -> None:
    if indices is None or offsets is None:
        raise RuntimeError(f"{name}: pass `indices` and `offsets` to be able to run the backward")
