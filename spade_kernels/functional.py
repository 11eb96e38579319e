"""SPADE as functions: validation, dtype policy, and the choice between the distinct-window and the dense path."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import ops
from spade_kernels.label_map import LabelMap, WindowIndex
from spade_kernels.normalization import Statistics, check_input

Segmap = LabelMap | Tensor
Groups = tuple[Tensor | None, Tensor | None]


def as_condition(segmap: Segmap, channels: int, like: Tensor | None = None) -> Segmap:
    """The condition as the layers take it: a LabelMap, or a float tensor (N, channels, H, W).

    Args:
        segmap: LabelMap; integer label map (N, H, W) or (N, 1, H, W) of ids below `channels`; or float
            (N, channels, H, W).
        channels: condition channels of the receiving weights.
        like: a tensor the condition must share batch size and device with.

    Raises:
        TypeError, ValueError: dtype, rank, channels, batch size, device or a label does not fit; the message says
            which.
    """
    if isinstance(segmap, Tensor) and not segmap.is_floating_point():
        if segmap.dim() == 4 and segmap.shape[1] == 1:
            segmap = segmap[:, 0]
        segmap = LabelMap(segmap, channels)
    if isinstance(segmap, LabelMap):
        count, given = len(segmap), segmap.channels
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


def spade(
    x: Tensor,
    segmap: Segmap,
    stats: Statistics,
    shared: tuple[Tensor, Tensor],
    gamma: tuple[Tensor, Tensor],
    beta: tuple[Tensor, Tensor],
    slope: float = 1.0,
) -> Tensor:
    """Spatially-adaptive normalization (Park et al. 2019, eq. 1), evaluated once per distinct window of a label map.

        y = leaky_relu(normalize(x) * (1 + gamma) + beta, slope)
        gamma, beta = conv(relu(conv(resize(segmap))))

    Args:
        x: (N, C, h, w) float; computed in float32 (float64 for float64), returned in x's dtype, channels-last.
        segmap: LabelMap, integer label map or float (N, channels, H, W); resized (nearest) to (h, w).
        stats: of x, from `normalization.statistics`.
        shared: weight (hidden, channels, k, k) and bias (hidden,) of the first convolution.
        gamma, beta: weight (C, hidden, k, k) and bias (C,).
        slope: leaky ReLU folded in; 1 is none.

    Returns:
        (N, C, h, w). First derivatives exist for x, all weights and biases, and a float segmap.
    """
    check_input(x, gamma[0].shape[0])
    _check_kernels(shared[0], gamma[0], beta[0])
    segmap = as_condition(segmap, shared[0].shape[1], like=x)
    weight = torch.cat((gamma[0], beta[0]))
    bias = torch.cat((gamma[1] + 1, beta[1]))
    if isinstance(segmap, Tensor):
        table = _dense_table(segmap, x, shared, weight, bias)
        return ops.modulate(x, stats.mean, stats.rstd, table, slope=slope, stats_over=stats.stats_over)

    kernel_size = shared[0].shape[-1]
    index = segmap.window_index(x.shape[2:], kernel_size)
    dtype = _table_dtype(x, shared[0])
    taps = _taps(segmap, shared[0].to(dtype))
    rows = index.modulation
    code_uses, hidden_uses, row_pixels = _groups(index)
    hidden = ops.hidden_rows(taps, shared[1].to(dtype), index.hidden.windows, *code_uses, True)
    table = ops.modulation_table(hidden, _by_tap(weight.to(dtype)), bias.to(dtype), rows.windows, *hidden_uses)
    return ops.modulate(
        x, stats.mean, stats.rstd, table, rows.pixel_row, rows.image_rows, *row_pixels, slope, stats.stats_over
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
        (N, out, h', w'), channels-last for a label map. First derivatives exist for weight, bias and a float segmap.
    """
    if isinstance(segmap, Tensor):
        planes = segmap if size is None else F.interpolate(segmap, size=tuple(size), mode="nearest")
        return F.conv2d(planes, weight, bias, stride, padding)
    if weight.shape[1] != segmap.channels:
        raise ValueError(f"segmap has {segmap.channels} condition channels, the weight takes {weight.shape[1]}")
    if weight.shape[-1] != weight.shape[-2]:
        raise ValueError(f"the weight must be square, got {tuple(weight.shape)}")
    seen = segmap.windows(segmap.shape[1:] if size is None else size, weight.shape[-1], stride, padding)
    uses: Groups = seen.uses_by_tap if torch.is_grad_enabled() else (None, None)
    rows = ops.hidden_rows(_taps(segmap, weight), bias, seen.windows, *uses, False)
    # The backward of the gather adds up thousands of pixels for a row: that needs the accumulation dtype.
    wide = rows if rows.dtype == torch.float64 else rows.float()
    return F.embedding(seen.pixel_row, wide).to(rows.dtype).permute(0, 3, 1, 2)


def _check_kernels(shared: Tensor, gamma: Tensor, beta: Tensor) -> None:
    hidden, _, k, _ = shared.shape
    wanted = (gamma.shape[0], hidden, k, k)
    if k % 2 == 0 or shared.shape[3] != k or gamma.shape != wanted or beta.shape != wanted:
        raise ValueError(
            f"shared {tuple(shared.shape)}, gamma {tuple(gamma.shape)} and beta {tuple(beta.shape)} weights must be "
            "(hidden, channels, k, k), (C, hidden, k, k) and (C, hidden, k, k) with one odd k"
        )


def _groups(index: WindowIndex) -> tuple[Groups, Groups, Groups]:
    """What the backward of the three ops needs; nothing where there will be none."""
    if not torch.is_grad_enabled():
        return (None, None), (None, None), (None, None)
    return index.hidden.uses_by_tap, index.modulation.uses_by_tap, index.modulation.row_pixels


def _taps(segmap: LabelMap, weight: Tensor) -> Tensor:
    """(codes, k*k, out): the convolution's response to each code at each tap."""
    by_channel = _by_tap(weight)
    return segmap.weigh(by_channel.flatten(1)).view(segmap.num_codes, *by_channel.shape[1:])


def _by_tap(weight: Tensor) -> Tensor:
    """(in, k*k, out) of a convolution weight (out, in, k, k)."""
    # As one matrix transpose: torch copies a transposed matrix in blocks, but a permuted tensor element by element.
    return weight.flatten(1).t().contiguous().view(weight.shape[1], -1, weight.shape[0])


def _table_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _dense_table(segmap: Tensor, x: Tensor, shared: tuple[Tensor, Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    """(N*h*w, 2C): one joint gamma and beta convolution, one row per pixel."""
    padding = weight.shape[-1] // 2
    planes = F.interpolate(segmap, size=x.shape[2:], mode="nearest").to(shared[0].dtype)
    hidden = F.conv2d(planes, *shared, padding=padding).relu()
    return F.conv2d(hidden, weight, bias, padding=padding).permute(0, 2, 3, 1).flatten(0, 2)
