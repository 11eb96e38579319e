"""gather_sum: the first convolution of a SPADE layer at every distinct window, as a sum over rows of a table."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import reference
from spade_kernels.ops._arguments import MOST_ENTRIES, NOT_EMPTY, size_of
from spade_kernels.ops._register import (
    acc_dtype,
    call,
    operators,
    plain_gradients,
    register,
    require_segments,
    stand_in,
)


def gather_sum(
    tap_responses: Tensor,
    bias: Tensor | None,
    windows: Tensor,
    indices: Tensor | None,
    offsets: Tensor | None,
    relu: bool,
) -> Tensor:
    """The first convolution at every distinct window: `reference.gather_sum`."""
    return call(operators.gather_sum, tap_responses, bias, windows, indices, offsets, relu)


def differentiable_sum_of_taps(tap_responses: Tensor, windows: Tensor) -> Tensor:
    """(rows, D): sum over t of tap_responses[windows[:, t], t], by operators that PyTorch can differentiate twice."""
    first, *others = map(F.embedding, windows.unbind(1), tap_responses.unbind(1))
    return sum(others, first)


def _check(a, tap_responses, bias, windows, indices, offsets, relu):
    a.floats("tap_responses", tap_responses, (NOT_EMPTY,) * 3)
    a.floats("bias", bias, (tap_responses.shape[2],))
    a.index("windows", windows, (size_of(windows, 0), tap_responses.shape[1]), 0, tap_responses.shape[0])
    a.segments(indices, offsets, tap_responses.shape[0] * tap_responses.shape[1], windows.numel())


def _fake(tap_responses, bias, windows, indices, offsets, relu):
    return tap_responses.new_empty(windows.shape[0], tap_responses.shape[2])


def _setup(ctx, inputs, output):
    tap_responses, bias, windows, indices, offsets, ctx.relu = inputs
    ctx.shape, ctx.dtype = tap_responses.shape, tap_responses.dtype
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(output, windows, indices, offsets)


def _backward(ctx, grad):
    rows, windows, indices, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        grad = grad * (rows > 0) if ctx.relu else grad
        # Without its ReLU the operator is linear: its gradients do not depend on the arguments that stand_in replaces.
        floats = stand_in(ctx.shape, ctx.dtype, rows), stand_in(ctx.shape[2:], ctx.bias_dtype, rows)
        arguments = (*floats, windows, indices, offsets, False)
        return plain_gradients("gather_sum", arguments, ctx.needs_input_grad, (grad,))
    require_segments("gather_sum", indices, offsets)
    d_tap_responses, d_bias = operators.gather_sum_grad(grad, rows, indices, offsets, ctx.shape[1], ctx.relu)
    d_bias = None if ctx.bias_dtype is None else d_bias.to(ctx.bias_dtype)
    return d_tap_responses.to(ctx.dtype), d_bias, None, None, None, None


register(
    "gather_sum(Tensor tap_responses, Tensor? bias, Tensor windows, Tensor? indices, Tensor? offsets, bool relu)"
    " -> Tensor",
    check=_check,
    fake=_fake,
    kernels=("triton", "cpu"),
    setup=_setup,
    backward=_backward,
    plain=partial(reference.gather_sum, sum_of_taps=differentiable_sum_of_taps),
)


def _check_grad(a, grad, rows, indices, offsets, num_taps, relu):
    a.integer("num_taps", num_taps, 1, MOST_ENTRIES)
    a.floats("grad", grad, (size_of(grad, 0), NOT_EMPTY))
    a.floats("rows", rows, grad.shape)
    segments, entries = size_of(offsets, 0) - 1, grad.shape[0] * num_taps
    if isinstance(segments, int):
        fits = segments > 0 and segments % num_taps == 0
        a.require(fits, "offsets must have one value more than a multiple of num_taps")
    a.index("indices", indices, (entries,), 0, entries)
    # The backward of modulate sums over image_offsets here: spare rows of a static label map belong to no image.
    a.bounds("offsets", offsets, segments, entries, exactly=False)


def _fake_grad(grad, rows, indices, offsets, num_taps, relu):
    acc, codes = acc_dtype(grad), (offsets.shape[0] - 1) // num_taps
    return grad.new_empty(codes, num_taps, grad.shape[1], dtype=acc), grad.new_empty(grad.shape[1], dtype=acc)


register(
    "gather_sum_grad(Tensor grad, Tensor rows, Tensor indices, Tensor offsets, int num_taps, bool relu)"
    " -> (Tensor, Tensor)",
    check=_check_grad,
    fake=_fake_grad,
    kernels=("triton", "cpu"),
)
