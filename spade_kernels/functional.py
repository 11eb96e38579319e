"""Computes SPADE in stages, for layers of any model: statistics of x, a table for the condition, and the modulation.

    stats = statistics(norm, x)
    table = modulation_table(segmap, x.shape[2:], weights, x_dtype=x.dtype)
    y = modulate(x, stats, table)

The caller can do arithmetic on the table's rows before `modulate`. `spade` composes the three stages for the layer.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from numbers import Real

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels import ops
from spade_kernels.condition import Segmap, Segments, as_condition, conv2d, resized, tap_responses
from spade_kernels.convolution import PackedConv2d, convolve
from spade_kernels.label_map import LabelMap, WindowIndex, as_size
from spade_kernels.modulation import DeferredModulation, ModulationTable, modulate
from spade_kernels.normalization import Moments, Normalized, Statistics, apply_norm, check_input, statistics
from spade_kernels.weights import (
    PackedWeights,
    Weights,
    check_weights,
    first_weight,
    joint_bias,
    joint_weight,
    zero_padding,
)

__all__ = [
    "ModulationTable",
    "PackedWeights",
    "Statistics",
    "Weights",
    "modulate",
    "modulation_table",
    "spade",
    "statistics",
]

Gain = float | Tensor


_path = "auto"

# Distinct hidden windows per pixel, and pixels of a feature map, from which on it is faster to evaluate every pixel.
# benchmarks/crossover.py measures them.
_DENSE_FROM, _DENSE_FROM_TRAINING = 0.6, 0.5
_DENSE_PIXELS, _DENSE_PIXELS_FROZEN = 32 * 32, 16 * 16


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Makes `spade` evaluate label maps on the given path inside the context, for measurements.

    Args:
        name: "windows" evaluates the convolutions once per distinct window, and "dense" at every pixel. "auto" takes
            "windows", unless nearly every pixel has a window of its own and "dense" is faster.
    """
    global _path
    if name not in ("auto", "windows", "dense"):
        raise ValueError(f"unknown path {name!r}; choose one of auto, windows, dense")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def modulation_table(
    segmap: Segmap,
    size: Sequence[int],
    weights: Weights,
    *,
    x_dtype: torch.dtype | None = None,
    gain: Gain | None = None,
    packed: PackedWeights | None = None,
) -> ModulationTable:
    """Computes scale 1 + gamma and shift beta of a SPADE layer: gamma, beta = conv(relu(conv(resize(segmap)))).

    For a label map the convolutions are evaluated once per distinct window. They are evaluated at every pixel for a
    float condition, and for a label map in which nearly every pixel has a window of its own.

    Args:
        segmap: LabelMap, integer label map or float (N, channels, H, W); resized (nearest) to `size`.
        size: (h, w) of the feature map to be modulated.
        weights: weight and bias of the three convolutions.
        x_dtype: dtype of that feature map; None for the dtype of the weights. If it is bfloat16 on a GPU, the weights
            are rounded to bfloat16 in products, else products are float32 (or tf32, as set in PyTorch). If x_dtype or
            the weights are float64, everything is computed in float64.
        gain: see `spade`.
        packed: packed weights, made from the same `weights`; only where no gradient is needed.

    Returns:
        A table whose rows are differentiable with respect to all weights and biases, gain, and a float segmap.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which.
    """
    gain = as_gain(gain)
    check_weights(weights)
    segmap = as_condition(segmap, weights.channels)
    return _table(segmap, as_size(size), weights, x_dtype or weights.dtype, gain, packed)


def spade(
    x: Tensor,
    segmap: Segmap,
    norm: nn.Module | Statistics,
    weights: Weights,
    *,
    negative_slope: float = 1.0,
    gain: Gain | None = None,
    upsample: int = 1,
    moments: Moments | None = None,
    packed: PackedWeights | None = None,
) -> Tensor:
    """Computes spatially-adaptive normalization (Park et al. 2019, eq. 1).

    Gamma and beta are evaluated once per distinct window of a label map:

        y = leaky_relu((norm(x) * (1 + gamma) + beta) * gain, negative_slope)
        gamma, beta = conv(relu(conv(resize(segmap))))

    Args:
        x: (N, C, h, w) float. Sums are in float32, or in float64 if x is; the result is in x's dtype, channels-last.
        segmap: LabelMap, integer label map or float (N, channels, H, W); resized (nearest) to (h, w) * upsample.
        norm: a module or the `Statistics` of x. Batch, synchronized batch, instance and group norm are fused, including
            their affine map, and update their running statistics in training; other modules are called with x.
        weights: weight and bias of the three convolutions; see `modulation_table` for the dtypes of products.
        negative_slope: slope of a leaky ReLU that is applied to the result; 1 for none.
        gain: factor of norm(x) * (1 + gamma) + beta: a positive number, or a tensor with one element, whose value is
            not checked, because the host would have to wait for a GPU. None is 1.
        upsample: 1, or 2 for nearest upsampling: every pixel of x stands for 2 x 2 pixels of the result.
        moments: `normalization.moments(norm, x)`, if the caller has it already.
        packed: packed weights, made from the same `weights`; only where no gradient is needed.

    Returns:
        (N, C, upsample * h, upsample * w). Derivatives exist for x, all weights and biases, gain, and a float segmap.

    Raises:
        TypeError, ValueError: an argument does not fit; the message says which. The norm has not been called by then.
    """
    return defer_spade(
        x,
        segmap,
        norm,
        weights,
        negative_slope=negative_slope,
        gain=gain,
        upsample=upsample,
        moments=moments,
        packed=packed,
    ).tensor()


def defer_spade(
    x: Tensor,
    segmap: Segmap,
    norm: nn.Module | Statistics,
    weights: Weights,
    *,
    negative_slope: float = 1.0,
    gain: Gain | None = None,
    upsample: int = 1,
    moments: Moments | None = None,
    packed: PackedWeights | None = None,
) -> DeferredModulation:
    """Computes `spade` up to its last pass over x, the modulation, which a convolution can fuse."""
    gain = as_gain(gain)
    check_input(x, weights.gamma[0].shape[0])
    check_weights(weights)
    check_upsample(upsample)
    segmap = as_condition(segmap, weights.channels, like=x)
    size = (x.shape[2] * upsample, x.shape[3] * upsample)
    # The norm follows all checks: a call that raises must not have updated the running statistics.
    normalized = apply_norm(norm, x, moments, upsample)
    table = _table(segmap, size, weights, x.dtype, gain, packed)
    return deferred(normalized, table, negative_slope)


def as_gain(gain: Gain | None) -> Gain | None:
    """Converts the gain to a Python float or a tensor of shape (); None stays None.

    Raises:
        TypeError, ValueError: the gain is not one number, or a number that is not positive and finite.
    """
    if gain is None:
        return None
    if isinstance(gain, Tensor):
        if gain.numel() != 1 or not gain.is_floating_point():
            raise ValueError(f"gain must be one floating-point number, got {gain.dtype} of shape {tuple(gain.shape)}")
        return gain.reshape(())
    if isinstance(gain, bool) or not isinstance(gain, Real):
        raise TypeError(f"gain must be a number or a tensor, got {type(gain).__name__}")
    if not 0 < gain < math.inf:
        raise ValueError(f"gain must be a positive number, got {gain}: a leaky ReLU is applied after it")
    return float(gain)


def times(values: Tensor, gain: Gain | None) -> Tensor:
    """Returns values * gain, in the dtype of the values."""
    if gain is None:
        return values
    return values * (gain.to(values.dtype) if isinstance(gain, Tensor) else gain)


def check_upsample(upsample: int) -> None:
    """Raises ValueError unless upsample is 1 or 2."""
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {upsample}")


def deferred(normalized: Normalized, table: ModulationTable, negative_slope: float) -> DeferredModulation:
    """Returns the deferred modulation of a normalized x. The norm's affine map is folded into the smaller table."""
    x, stats, upsample, weight, bias = normalized
    if weight is not None or bias is not None:
        table = table.with_rows(_with_affine(table.rows, weight, bias))
    return DeferredModulation(x, stats, table, negative_slope, upsample)


def _with_affine(rows: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """Returns rows into which the norm's affine map, weight * x + bias, is folded."""
    acc_dtype = torch.promote_types(rows.dtype, torch.float32)
    scale, shift = rows.to(acc_dtype).chunk(2, 1)
    if bias is not None:
        shift = shift + scale * bias.to(acc_dtype)
    if weight is not None:
        scale = scale * weight.to(acc_dtype)
    return torch.cat((scale, shift), 1).to(rows.dtype)


def _table(
    segmap: Segmap,
    size: tuple[int, ...],
    weights: Weights,
    x_dtype: torch.dtype,
    gain: Gain | None,
    packed: PackedWeights | None,
) -> ModulationTable:
    dtype = _table_dtype(x_dtype, weights.gamma[0])
    if gain is not None or dtype != weights.dtype:
        packed = None
    if isinstance(segmap, Tensor) or weights.padding_mode == "reflect":
        return _dense_table(segmap, size, weights, gain, packed)
    if weights.shared is None:
        return _class_table(segmap, size, weights, gain, packed)
    index = segmap.window_index(size, weights.kernel_size)
    if _prefers_dense(index, packed is not None):
        return _dense_table(segmap, size, weights, gain, packed)
    segments = index.segments() if torch.is_grad_enabled() else ((None, None),) * 3

    def build() -> Tensor:
        return _window_table(segmap, index, segments, dtype, weights, gain, packed)

    rows = packed.table(segmap, size, build) if packed else build()
    return ModulationTable(rows, index.modulation.pixel_row, index.modulation.image_offsets, *segments[2])


def _table_dtype(x_dtype: torch.dtype, weight: Tensor) -> torch.dtype:
    if torch.float64 in (x_dtype, weight.dtype):
        return torch.float64
    # Tensor cores multiply bfloat16 and add up in float32; on other hardware float32 is as fast. The range of float16
    # is too small for the gradient of a row, which is a sum over thousands of pixels.
    return torch.bfloat16 if weight.is_cuda and x_dtype == torch.bfloat16 else torch.float32


def _prefers_dense(index: WindowIndex, frozen: bool) -> bool:
    if _path != "auto" or torch.compiler.is_compiling():
        return _path == "dense"
    images, height, width = index.hidden.pixel_row.shape
    threshold = _DENSE_FROM_TRAINING if torch.is_grad_enabled() else _DENSE_FROM
    enough = height * width >= (_DENSE_PIXELS_FROZEN if frozen else _DENSE_PIXELS)
    return enough and len(index.hidden) > threshold * images * height * width


def _window_table(
    segmap: LabelMap,
    index: WindowIndex,
    segments: Sequence[Segments],
    dtype: torch.dtype,
    weights: Weights,
    gain: Gain | None,
    packed: PackedWeights | None,
) -> Tensor:
    """Returns scale and shift of every distinct window, times gain, as (rows, 2C)."""
    acc_dtype = torch.promote_types(dtype, torch.float32)
    if packed:
        responses, hidden_bias, bias = packed.tap_responses(segmap), packed.hidden_bias, packed.bias
    else:
        assert weights.shared is not None
        responses, hidden_bias = tap_responses(segmap, weights.shared[0].to(dtype)), weights.shared[1].to(acc_dtype)
        bias = joint_bias(weights, acc_dtype)
    relu = weights.hidden_slope == 0
    hidden = ops.gather_sum(responses, hidden_bias, index.hidden.windows, *segments[0], relu)
    hidden = hidden if relu else F.leaky_relu(hidden, weights.hidden_slope)
    # The gain multiplies hidden rows and bias instead of the larger table, which is linear in both together.
    hidden, bias = times(hidden, gain), times(bias, gain)
    packed_weight = packed.packed_weight if packed else None
    # Weights in the accumulation dtype stay as they are: the operator rounds a copy for the product, and their
    # gradients are not rounded.
    gamma, beta = (w if w.dtype == acc_dtype else w.to(dtype) for w in (weights.gamma[0], weights.beta[0]))
    return ops.modulation_table(hidden, gamma, beta, bias, index.modulation.windows, packed_weight, *segments[1])


def _class_table(
    segmap: LabelMap, size: tuple[int, ...], weights: Weights, gain: Gain | None, packed: PackedWeights | None
) -> ModulationTable:
    """Returns the table of a layer without a hidden layer: one row for each distinct k x k window of labels."""
    k = weights.kernel_size
    seen = segmap.windows(size, k, 1, k // 2)
    uses: Segments = (None, None)
    pixels: Segments = (None, None)
    if torch.is_grad_enabled():
        uses, pixels = seen.tap_segments, seen.row_segments
    acc_dtype = torch.promote_types(weights.dtype, torch.float32)
    responses = packed.tap_responses(segmap) if packed else tap_responses(segmap, first_weight(weights).to(acc_dtype))
    bias = packed.bias if packed else joint_bias(weights, acc_dtype)
    rows = ops.gather_sum(responses, bias, seen.windows, *uses, False)
    return ModulationTable(times(rows, gain), seen.pixel_row, seen.image_offsets, *pixels)


def _dense_table(
    segmap: Segmap, size: Sequence[int], weights: Weights, gain: Gain | None, packed: PackedWeights | None
) -> ModulationTable:
    """Returns the table with a row for every pixel, times gain, from one joint convolution for gamma and beta.

    A 1 x 1 convolution of a smaller condition has a row for every pixel of that condition.
    """
    shared, joint = packed.dense() if packed else (None, None)
    if weights.shared is None:
        planes = segmap if isinstance(segmap, Tensor) else segmap.one_hot(weights.dtype)
        is_small = weights.kernel_size == 1 and planes.shape[2] * planes.shape[3] < math.prod(size)
        hidden = (planes if is_small else resized(planes, size)).to(weights.dtype)
    else:
        is_small, hidden = False, _dense_hidden(segmap, size, weights, shared)
    hidden = _reflected(hidden, weights)
    if joint:
        maps = joint(hidden)
    else:
        weight, bias = joint_weight(weights), joint_bias(weights, weights.gamma[1].dtype)
        maps = convolve(hidden, times(weight, gain), times(bias, gain), zero_padding(weights))
    rows = maps.permute(0, 2, 3, 1).flatten(0, 2)
    return ModulationTable(rows, *_nearest(maps, size)) if is_small else ModulationTable(rows)


def _dense_hidden(segmap: Segmap, size: Sequence[int], weights: Weights, packed: PackedConv2d | None) -> Tensor:
    """Returns the hidden layer at every pixel, (N, hidden, h, w)."""
    assert weights.shared is not None
    if isinstance(segmap, LabelMap) and weights.padding_mode == "zeros":
        hidden = conv2d(segmap, *weights.shared, padding=weights.kernel_size // 2, size=size)
    else:
        planes = segmap if isinstance(segmap, Tensor) else segmap.one_hot(weights.dtype)
        planes = _reflected(resized(planes, size).to(weights.dtype), weights)
        if packed:
            hidden = packed(planes.contiguous(memory_format=torch.channels_last))
            if weights.hidden_slope == 0:
                return hidden
        else:
            hidden = convolve(planes, *weights.shared, zero_padding(weights))
    return F.leaky_relu(hidden, weights.hidden_slope) if weights.hidden_slope else hidden.relu()


def _reflected(maps: Tensor, weights: Weights) -> Tensor:
    return F.pad(maps, [weights.kernel_size // 2] * 4, mode="reflect") if weights.padding_mode == "reflect" else maps


def _nearest(maps: Tensor, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Returns the last four attributes of a table whose rows are the pixels of smaller maps.

    The maps (N, C, H, W) are resized (nearest) to `size`.
    """
    n, _, height, width = maps.shape
    pixels = torch.arange(n * height * width, device=maps.device).view(n, height, width)
    rows, columns = (
        F.interpolate(torch.arange(old, dtype=torch.float64, device=maps.device).view(1, 1, -1), new).long().flatten()
        for old, new in zip((height, width), size, strict=True)
    )
    pixel_row = pixels[:, rows][:, :, columns]
    segments = ops.segments_by_value(pixel_row, pixels.numel()) if torch.is_grad_enabled() else (None, None)
    return pixel_row, torch.arange(n + 1, device=maps.device) * (height * width), *segments
