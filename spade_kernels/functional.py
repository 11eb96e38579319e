"""SPADE as functions: validation, dtype policy, and the choice between the distinct-window and the dense path."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from numbers import Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import backends, ops
from spade_kernels.convolution import PackedConv2d, convolve, is_packable
from spade_kernels.label_map import LabelMap, WindowIndex
from spade_kernels.normalization import Statistics, check_input
from spade_kernels.one_hot import detect_one_hot

Segmap = LabelMap | Tensor
Gain = float | Tensor
Segments = tuple[Tensor | None, Tensor | None]


def as_condition(segmap: Segmap, channels: int, like: Tensor | None = None) -> Segmap:
    """The condition as the layers take it: a LabelMap, or a float tensor (N, channels, H, W) that is not one-hot.

    Args:
        segmap: LabelMap; integer label map (N, H, W) or (N, 1, H, W) of ids below `channels`; or float
            (N, channels, H, W).
        channels: condition channels of the receiving weights.
        like: a tensor the condition must share batch size and device with.

    Raises:
        TypeError, ValueError: dtype, rank, channels, batch size, device or a label does not fit; the message says
            which.
    """
    if isinstance(segmap, Tensor):
        ops.require_storage("segmap", segmap)
    if isinstance(segmap, Tensor) and not segmap.is_floating_point():
        if segmap.dim() == 4 and segmap.shape[1] == 1:
            segmap = segmap[:, 0]
        segmap = LabelMap(segmap, channels)
    elif isinstance(segmap, Tensor) and segmap.dim() == 4:
        label_map = detect_one_hot(segmap)
        segmap = segmap if label_map is None else label_map
    if isinstance(segmap, LabelMap):
        count, given = segmap.shape[0], segmap.channels
    elif isinstance(segmap, Tensor):
        if segmap.dim() != 4:
            raise ValueError(f"a dense segmap must have shape (N, {channels}, H, W), got {tuple(segmap.shape)}")
        count, given = segmap.shape[:2]
    else:
        raise TypeError(f"segmap must be a LabelMap or a tensor, got {type(segmap).__name__}")
    if given != channels:
        raise ValueError(
            f"segmap has {given} condition channels, the layer was built for {channels} (classes + edge plane)"
        )
    if like is not None and count != like.shape[0]:
        raise ValueError(f"segmap holds {count} images, x holds {like.shape[0]}")
    if like is not None and segmap.device != like.device:
        raise ValueError(
            f"segmap is on {segmap.device}, x on {like.device}; move it with segmap.to({str(like.device)!r})"
        )
    return segmap


def as_gain(gain: Gain | None) -> Gain | None:
    """The gain as `spade` takes it: a Python float or a tensor of shape ().

    Raises:
        TypeError, ValueError: it is not one number, or a number that is not positive and finite.
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
    """values * gain, in the dtype of the values."""
    if gain is None:
        return values
    return values * (gain.to(values.dtype) if isinstance(gain, Tensor) else gain)


class Weights(NamedTuple):
    """The convolutions of a SPADE layer, weight and bias each.

    shared: (hidden, channels, k, k) and (hidden,); gamma, beta: (C, hidden, k, k) and (C,); one odd k.
    """

    shared: tuple[Tensor, Tensor]
    gamma: tuple[Tensor, Tensor]
    beta: tuple[Tensor, Tensor]


class PackedWeights:
    """Packed weights of a frozen SPADE layer, reused across calls. Not differentiable.

    What depends on the condition is computed for the first one of its kind and cached, unless by compiled code.
    """

    def __init__(self, weights: Weights):
        self._weights = weights
        self.packed_weight = ops.pack_modulation_weight(weights.gamma[0].detach(), weights.beta[0].detach())
        acc_dtype = torch.promote_types(weights.gamma[1].dtype, torch.float32)
        self.hidden_bias = weights.shared[1].detach().to(acc_dtype, copy=True)
        self.bias = _joint_bias(weights, acc_dtype)
        self._taps: dict[tuple, Tensor] = {}
        self._dense: tuple[PackedConv2d, PackedConv2d] | None = None

    @property
    def is_traceable(self) -> bool:
        """True if calls do not change it; those of packed convolutions do."""
        return not is_packable(self._weights.shared[0])

    def taps(self, segmap: LabelMap) -> Tensor:
        """The shared convolution's taps for label maps of this one's kind."""
        weight = self._weights.shared[0]
        if segmap.is_pooled:
            return _taps(segmap, weight)
        kind = (segmap.num_labels, segmap.edges is not None)
        if kind in self._taps:
            return self._taps[kind]
        taps = _taps(segmap, weight)
        if backends.is_cacheable(taps):
            backends.synchronize(taps)
            self._taps[kind] = taps
        return taps

    def dense(self) -> tuple[PackedConv2d, PackedConv2d]:
        """The shared convolution with its ReLU, and the joint one."""
        if self._dense is not None:
            return self._dense
        weight, bias = self._weights.shared
        joint, padding = _joint_weight(self._weights), [weight.shape[-1] // 2] * 2
        dense = PackedConv2d(weight, bias, padding, relu=True), PackedConv2d(joint, self.bias, padding)
        if backends.is_cacheable(joint):
            backends.synchronize(joint)
            self._dense = dense
        return dense


_path = "auto"

# Where benchmarks/crossover.py has the two ways cross: hidden windows per pixel, and pixels of a feature map.
_DENSE_FROM, _DENSE_FROM_TRAINING = 0.6, 0.5
_DENSE_PIXELS, _DENSE_PIXELS_FROZEN = 32 * 32, 16 * 16


@contextlib.contextmanager
def use_path(name: str) -> Iterator[None]:
    """Within it, `spade` evaluates label maps the given way; for measurements.

    Args:
        name: "windows": once per distinct window; "dense": at every pixel; "auto": windows unless nearly every pixel
            has a window of its own and dense is faster.
    """
    global _path
    if name not in ("auto", "windows", "dense"):
        raise ValueError(f"unknown path {name!r}; choose one of auto, windows, dense")
    before, _path = _path, name
    try:
        yield
    finally:
        _path = before


def spade(
    x: Tensor,
    segmap: Segmap,
    stats: Statistics,
    weights: Weights,
    *,
    negative_slope: float = 1.0,
    gain: Gain | None = None,
    upsample: int = 1,
    packed: PackedWeights | None = None,
) -> Tensor:
    """Spatially-adaptive normalization (Park et al. 2019, eq. 1), evaluated once per distinct window of a label map.

        y = leaky_relu((normalize(x) * (1 + gamma) + beta) * gain, negative_slope)
        gamma, beta = conv(relu(conv(resize(segmap))))

    Args:
        x: (N, C, h, w) float; summed up in float32 (float64 for float64), returned in x's dtype, channels-last. The
            weights enter products as bfloat16 beside a bfloat16 x on a GPU, else in float32 (tf32 as torch is set).
        segmap: LabelMap, integer label map or float (N, channels, H, W); resized (nearest) to (h, w) * upsample.
        stats: of x, from `normalization.statistics`.
        negative_slope: leaky ReLU folded in; 1 is none.
        gain: positive number, or a tensor of one (whose value is not checked: that would wait for a GPU), which
            normalize(x) * (1 + gamma) + beta is multiplied by; None is 1.
        upsample: 2 takes every pixel of x for 2 x 2 (nearest upsampling); 1 or 2.
        packed: of the same weights, where no gradient is wanted.

    Returns:
        (N, C, upsample * h, upsample * w). Derivatives exist for x, all weights and biases, gain, and a float segmap.
    """
    gain = as_gain(gain)
    check_input(x, weights.gamma[0].shape[0])
    check_weights(weights)
    check_upsample(upsample)
    segmap = as_condition(segmap, weights.shared[0].shape[1], like=x)
    return defer_spade(
        x, segmap, stats, weights, negative_slope=negative_slope, gain=gain, upsample=upsample, packed=packed
    ).tensor()


def defer_spade(
    x: Tensor,
    segmap: Segmap,
    stats: Statistics,
    weights: Weights,
    *,
    negative_slope: float,
    gain: Gain | None,
    upsample: int,
    packed: PackedWeights | None,
) -> ops.DeferredModulation:
    """`spade` without its last pass over x, which a convolution can fuse. It trusts arguments that `spade` checks."""
    size = (x.shape[2] * upsample, x.shape[3] * upsample)
    dtype = _table_dtype(x, weights.shared[0])
    if gain is not None or dtype != weights.shared[0].dtype:
        packed = None
    how: tuple = (negative_slope, upsample, stats.stats_scope)
    index = None if isinstance(segmap, Tensor) else segmap.window_index(size, weights.shared[0].shape[-1])
    if isinstance(segmap, Tensor) or index is None or _prefers_dense(index, packed is not None):
        table = _dense_table(segmap, size, weights, gain, packed)
        return ops.DeferredModulation(x, stats.mean, stats.rstd, table, None, None, None, None, *how)
    segments = index.segments() if torch.is_grad_enabled() else ((None, None),) * 3
    table = _window_table(segmap, index, segments, dtype, weights, gain, packed)
    rows = index.modulation
    return ops.DeferredModulation(
        x, stats.mean, stats.rstd, table, rows.pixel_row, rows.image_offsets, *segments[2], *how
    )


def conv2d(
    segmap: Segmap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    size: Sequence[int] | None = None,
) -> Tensor:
    """`F.conv2d` of the condition, resized (nearest) to `size` first; a label map needs no one-hot tensor for it.

    Args:
        segmap: LabelMap or float (N, channels, H, W).
        weight: (out, channels, k, k); bias (out,) or None.

    Returns:
        (N, out, h', w'), channels-last for a label map. Derivatives exist for weight, bias and a float segmap.
    """
    if isinstance(segmap, Tensor):
        planes = segmap if size is None else _resized(segmap, size)
        return (
            convolve(planes, weight, bias, [padding] * 2)
            if stride == 1
            else F.conv2d(planes, weight, bias, stride, padding)
        )
    if weight.shape[1] != segmap.channels:
        raise ValueError(f"segmap has {segmap.channels} condition channels, the weight takes {weight.shape[1]}")
    if weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"the weight must be square, got {tuple(weight.shape)}")
    seen = segmap.windows(segmap.shape[1:] if size is None else size, weight.shape[-1], stride, padding)
    uses: Segments = (None, None)
    pixels: Segments = (None, None)
    if torch.is_grad_enabled():
        uses, pixels = seen.tap_segments, seen.row_segments
    # In the accumulation dtype: a row's gradient is the sum of thousands of pixels'.
    acc_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    taps, bias = _taps(segmap, weight.to(acc_dtype)), None if bias is None else bias.to(acc_dtype)
    rows = ops.gather_sum(taps, bias, seen.windows, *uses, False)
    # Every pixel's row is a window of one tap.
    pixel_rows = ops.gather_sum(rows.unsqueeze(1), None, seen.pixel_row.view(-1, 1), *pixels, False)
    return pixel_rows.to(_dtype_of_convolution(weight)).view(*seen.pixel_row.shape, -1).permute(0, 3, 1, 2)


def _dtype_of_convolution(weight: Tensor) -> torch.dtype:
    """The dtype of the result of `F.conv2d` with this weight."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def _resized(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Nearest. Torch copies what has the size already."""
    return planes if planes.shape[2:] == tuple(size) else F.interpolate(planes, size=tuple(size), mode="nearest")


def check_upsample(upsample: int) -> None:
    """Raises ValueError unless upsample is 1 or 2."""
    if upsample not in (1, 2):
        raise ValueError(f"upsample must be 1 or 2, got {upsample}")


def check_weights(weights: Weights) -> None:
    """Raises ValueError unless the shapes of the weights and biases fit together."""
    shared, gamma, beta = (weight for weight, _ in weights)
    hidden, _, k, _ = shared.shape
    wanted = (gamma.shape[0], hidden, k, k)
    if k % 2 == 0 or shared.shape[3] != k or gamma.shape != wanted or beta.shape != wanted:
        raise ValueError(
            f"shared {tuple(shared.shape)}, gamma {tuple(gamma.shape)} and beta {tuple(beta.shape)} weights must be "
            "(hidden, channels, k, k), (C, hidden, k, k) and (C, hidden, k, k) with one odd k"
        )
    for name, (weight, bias) in zip(weights._fields, weights, strict=True):
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of {name} must have shape ({len(weight)},), got {tuple(bias.shape)}")


def _taps(segmap: LabelMap, weight: Tensor) -> Tensor:
    """(codes, k*k, out): the convolution's response to each code at each tap."""
    by_channel = _by_tap(weight)
    return segmap.codebook_matmul(by_channel.flatten(1)).view(segmap.num_codes, *by_channel.shape[1:])


def _by_tap(weight: Tensor) -> Tensor:
    """(in, k*k, out) of a convolution weight (out, in, k, k)."""
    # As one matrix transpose: torch copies a transposed matrix in blocks, but a permuted tensor element by element.
    return weight.flatten(1).t().contiguous().view(weight.shape[1], -1, weight.shape[0])


def _table_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    if torch.float64 in (x.dtype, weight.dtype):
        return torch.float64
    # Tensor cores multiply these, and add up in float32; elsewhere float32 is as fast. float16 is too narrow for the
    # gradient of a row, the sum of thousands of pixels'.
    return torch.bfloat16 if x.is_cuda and x.dtype == torch.bfloat16 else torch.float32


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
    """(rows, 2C): scale and shift of every distinct window, times gain."""
    acc_dtype = torch.promote_types(dtype, torch.float32)
    if packed:
        taps, hidden_bias, bias = packed.taps(segmap), packed.hidden_bias, packed.bias
    else:
        taps, hidden_bias = _taps(segmap, weights.shared[0].to(dtype)), weights.shared[1].to(acc_dtype)
        bias = _joint_bias(weights, acc_dtype)
    hidden = ops.gather_sum(taps, hidden_bias, index.hidden.windows, *segments[0], True)
    # The table is linear in hidden rows and bias, which are smaller.
    hidden, bias = times(hidden, gain), times(bias, gain)
    packed_weight = packed.packed_weight if packed else None
    # Weights wider than hidden rows are rounded where they are laid out for the product, their gradients nowhere.
    gamma, beta = (w if w.dtype == acc_dtype else w.to(dtype) for w in (weights.gamma[0], weights.beta[0]))
    return ops.modulation_table(hidden, gamma, beta, bias, index.modulation.windows, packed_weight, *segments[1])


def _dense_table(
    segmap: Segmap, size: tuple[int, int], weights: Weights, gain: Gain | None, packed: PackedWeights | None
) -> Tensor:
    """(N*h*w, 2C): one joint gamma and beta convolution, one row per pixel."""
    padding = weights.shared[0].shape[-1] // 2
    convolutions = packed.dense() if packed else None
    if convolutions and isinstance(segmap, Tensor):
        planes = _resized(segmap, size).to(weights.shared[0].dtype)
        hidden = convolutions[0](planes.contiguous(memory_format=torch.channels_last))
    else:
        segmap = segmap.to(weights.shared[0].dtype) if isinstance(segmap, Tensor) else segmap
        hidden = conv2d(segmap, *weights.shared, padding=padding, size=size).relu()
    if convolutions:
        table = convolutions[1](hidden)
    else:
        weight, bias = _joint_weight(weights), _joint_bias(weights, weights.gamma[1].dtype)
        table = convolve(hidden, times(weight, gain), times(bias, gain), [padding] * 2)
    return table.permute(0, 2, 3, 1).flatten(0, 2)


def _joint_weight(weights: Weights) -> Tensor:
    """gamma and beta as one convolution."""
    return torch.cat((weights.gamma[0], weights.beta[0]))


def _joint_bias(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Its bias, so that it gives scale = 1 + gamma, and shift = beta."""
    return torch.cat((weights.gamma[1].to(dtype) + 1, weights.beta[1].to(dtype)))
