"""modulate: normalization, modulation and leaky ReLU of x in one pass, scale and shift gathered from a table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from spade_kernels import reference, transforms
from spade_kernels.ops._arguments import NOT_EMPTY, size_of
from spade_kernels.ops._register import (
    acc_dtype,
    call,
    channels_last_like,
    operators,
    plain_gradients,
    register,
    require_segments,
)

_STATS_SCOPES = ("none", "image", "batch", "world")


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
    """Normalizes, modulates and activates x: `reference.modulate`.

    Args:
        image_offsets, indices, offsets: from the window index; needed by the backward only.
        stats_scope: the values that mean and rstd were computed from, so that the gradient of x includes its part
            through them: "none" (constants), "image" (each image and channel), "group:G" (each image and each of G
            groups of channels, with the group's values for each of its channels), "batch" (this process's batch),
            "world" (all processes' batches). Mean and rstd must be detached: asking for their own gradients raises.
    """
    return call(
        operators.modulate,
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


def check_modulation(a, x, mean, rstd, table, pixel_row, upsample) -> None:
    """Checks x, its statistics, the table, and the row that each pixel of the result takes from it."""
    a.integer("upsample", upsample, 1, 2)
    a.require(x.dim() == 4, f"x must have shape (N, C, h, w), got {tuple(x.shape)}")
    images, channels, height, width = x.shape
    a.floats("x", x, (images, NOT_EMPTY, height, width))
    shape = _stats_shape(mean, x)
    a.floats("mean", mean, shape)
    a.floats("rstd", rstd, shape)
    pixels = (images, upsample * height, upsample * width)
    rows = pixels[0] * pixels[1] * pixels[2] if pixel_row is None else size_of(table, 0)
    a.floats("table", table, (rows, 2 * channels))
    if pixel_row is not None:
        a.index("pixel_row", pixel_row, pixels, 0, table.shape[0])


def _stats_shape(stats: Tensor, x: Tensor) -> tuple[Any, Any]:
    is_shared = isinstance(size_of(stats, 0), int) and size_of(stats, 0) == 1
    return 1 if is_shared else x.shape[0], x.shape[1]


def _check(a, x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, negative_slope, upsample, stats_scope):
    check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    if image_offsets is not None:
        a.bounds("image_offsets", image_offsets, x.shape[0], table.shape[0], exactly=False)
    if indices is not None or offsets is not None:
        a.require(pixel_row is not None, "indices and offsets need pixel_row, which is not given")
    a.segments(indices, offsets, table.shape[0], 0 if pixel_row is None else pixel_row.numel())
    if stats_scope not in _STATS_SCOPES and not _is_group_scope(stats_scope):
        a.fail(f"stats_scope must be none, image, group:G, batch or world, got {stats_scope!r}")
    groups = num_groups(stats_scope)
    divide = not isinstance(x.shape[1], int) or x.shape[1] % groups == 0
    a.require(divide, f"{groups} groups do not divide x's channels")


def _is_group_scope(stats_scope: str) -> bool:
    digits = stats_scope.removeprefix("group:")
    return digits != stats_scope and digits.isascii() and digits.isdigit() and digits[0] != "0" and len(digits) < 10


def num_groups(stats_scope: str) -> int:
    """G of "group:G"; 1 of any other scope."""
    return int(stats_scope.removeprefix("group:")) if stats_scope.startswith("group:") else 1


def _fake(x, mean, rstd, table, pixel_row, image_offsets, indices, offsets, negative_slope, upsample, stats_scope):
    return channels_last_like(x, upsample)


def _setup(ctx, inputs, output):
    *tensors, ctx.negative_slope, ctx.upsample, ctx.stats_scope = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad):
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        raise NotImplementedError("modulate: mean and rstd must be detached; stats_scope says how they depend on x")
    # saved_tensors is read once: activation checkpointing would recompute the layer for a second read, and refuses to.
    tensors = ctx.saved_tensors
    x, mean, rstd, table, pixel_row, image_offsets, indices, offsets = tensors
    numbers = (ctx.negative_slope, ctx.upsample)
    if torch.is_grad_enabled():
        arguments = (*tensors, *numbers, ctx.stats_scope)
        return plain_gradients("modulate", arguments, ctx.needs_input_grad, (grad,))
    if pixel_row is not None:
        require_segments("modulate", indices, offsets)
    d_table = operators.modulate_table_grad(grad, x, mean, rstd, table, pixel_row, indices, offsets, *numbers)
    d_x = None
    if ctx.needs_input_grad[0]:
        means = _normalization_means(ctx.stats_scope, grad, table, d_table, image_offsets)
        d_x = operators.modulate_input_grad(grad, x, mean, rstd, table, pixel_row, *means, *numbers)
    return d_x, None, None, d_table.to(table.dtype), None, None, None, None, None, None, None


def _normalization_means(
    stats_scope: str, grad: Tensor, table: Tensor, d_table: Tensor, image_offsets: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Means of d(xhat) and d(xhat) * xhat over the pixels of y that mean and rstd cover, from the table and d_table.

    Every pixel of a row has the row's scale, so sum(scale * dy) over pixels is sum(scale * d_shift) over rows.
    """
    if stats_scope == "none":
        return None, None
    images, channels, pixels = grad.shape[0], grad.shape[1], grad.shape[2] * grad.shape[3]
    # Few operations are used, because on a GPU most of them take the time of a launch.
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
        sums = operators.gather_sum_grad(products, products, every, image_offsets, 1, False)[0]
        means = sums.view(images, -1) / pixels
    if stats_scope.startswith("group:"):
        groups = means.view(images, 2, num_groups(stats_scope), -1)
        means = groups.mean(3, keepdim=True).expand_as(groups).reshape(images, -1)
    of_scale, of_shift = means.split(channels, 1)
    return of_shift, of_scale


def _plain(x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, pixel_row: Tensor | None, *others: Any) -> Tensor:
    *_, negative_slope, upsample, stats_scope = others
    if stats_scope != "none":
        mean, rstd = _differentiable_statistics(reference.accumulator(x), mean, rstd, stats_scope)
    return reference.modulate(x, mean, rstd, table, pixel_row, None, None, None, negative_slope, upsample, "none")


def _differentiable_statistics(x: Tensor, mean: Tensor, rstd: Tensor, stats_scope: str) -> tuple[Tensor, Tensor]:
    """mean and rstd with unchanged values, and with derivatives with respect to x, which they were computed from."""
    if stats_scope == "image":
        variance, centre = torch.var_mean(x, (2, 3), correction=0)
    elif stats_scope.startswith("group:"):
        groups = x.unflatten(1, (num_groups(stats_scope), -1))
        moments = torch.var_mean(groups, (2, 3, 4), correction=0)
        variance, centre = (t.repeat_interleave(groups.shape[2], 1) for t in moments)
    elif stats_scope == "batch":
        variance, centre = (t.unsqueeze(0) for t in torch.var_mean(x, (0, 2, 3), correction=0))
    else:
        variance, centre = _moments_of_world(x)
    variance = variance - variance.detach()
    return mean + (centre - centre.detach()), (rstd.pow(-2) + variance).rsqrt()


def _moments_of_world(x: Tensor) -> tuple[Tensor, Tensor]:
    """(1, C) variance and mean of all processes' x, with the derivatives of the sum of all processes' results."""
    transforms.require_one_process()
    count = x.new_tensor(x.numel() // x.shape[1])
    dist.all_reduce(count)
    mean = _AllReduce.apply(x.sum((0, 2, 3))) / count
    variance = _AllReduce.apply((x - mean[:, None, None]).square().sum((0, 2, 3))) / count
    return variance.unsqueeze(0), mean.unsqueeze(0)


class _AllReduce(torch.autograd.Function):
    """The sum of all processes' tensors, which has derivatives of every order."""

    @staticmethod
    def forward(ctx, t: Tensor) -> Tensor:
        total = t.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _AllReduce.apply(grad.contiguous())


register(
    "modulate(Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row, Tensor? image_offsets,"
    " Tensor? indices, Tensor? offsets, float negative_slope, int upsample, str stats_scope) -> Tensor",
    check=_check,
    fake=_fake,
    kernels=("cuda", "triton", "cpu"),
    setup=_setup,
    backward=_backward,
    plain=_plain,
)


def _check_table_grad(a, grad, x, mean, rstd, table, pixel_row, indices, offsets, negative_slope, upsample):
    check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    a.floats("grad", grad, _shape_of_y(x, upsample))
    together = (indices is None) == (pixel_row is None)
    a.require(together, "indices and offsets must be given with pixel_row, and only then")
    a.segments(indices, offsets, table.shape[0], 0 if pixel_row is None else pixel_row.numel())


def _shape_of_y(x: Tensor, upsample: int) -> Sequence[Any]:
    return (*x.shape[:2], upsample * x.shape[2], upsample * x.shape[3])


def _fake_table_grad(grad, x, mean, rstd, table, pixel_row, indices, offsets, negative_slope, upsample):
    return table.new_empty(table.shape, dtype=acc_dtype(x))


register(
    "modulate_table_grad(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row,"
    " Tensor? indices, Tensor? offsets, float negative_slope, int upsample) -> Tensor",
    check=_check_table_grad,
    fake=_fake_table_grad,
    kernels=("cuda", "triton", "cpu"),
)


def _check_input_grad(a, grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, negative_slope, upsample):
    check_modulation(a, x, mean, rstd, table, pixel_row, upsample)
    a.floats("grad", grad, _shape_of_y(x, upsample))
    together = (mean_shift is None) == (mean_scale is None)
    a.require(together, "mean_shift and mean_scale must be given together")
    if mean_shift is not None:
        shape = _stats_shape(mean_shift, x)
        a.floats("mean_shift", mean_shift, shape)
        a.floats("mean_scale", mean_scale, shape)


def _fake_input_grad(grad, x, mean, rstd, table, pixel_row, mean_shift, mean_scale, negative_slope, upsample):
    return channels_last_like(x)


register(
    "modulate_input_grad(Tensor grad, Tensor x, Tensor mean, Tensor rstd, Tensor table, Tensor? pixel_row,"
    " Tensor? mean_shift, Tensor? mean_scale, float negative_slope, int upsample) -> Tensor",
    check=_check_input_grad,
    fake=_fake_input_grad,
    kernels=("cuda", "triton", "cpu"),
)
