"""The condition of a SPADE layer: its conversion from every form that callers may pass, and its convolution."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_kernels import ops
from spade_kernels.convolution import convolve
from spade_kernels.label_map import LabelMap
from spade_kernels.one_hot import detect_one_hot

Segmap = LabelMap | Tensor
Segments = tuple[Tensor | None, Tensor | None]


def as_condition(segmap: Segmap, channels: int, like: Tensor | None = None) -> Segmap:
    """Converts the condition to a LabelMap, or to a float tensor (N, channels, H, W) that is not one-hot.

    Args:
        segmap: LabelMap; integer label map (N, H, W) or (N, 1, H, W) of ids below `channels`; or float
            (N, channels, H, W).
        channels: number of condition channels that the weights take.
        like: tensor whose batch size and device the condition must have; None for any.

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


def conv2d(
    segmap: Segmap,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int = 1,
    padding: int = 0,
    size: Sequence[int] | None = None,
) -> Tensor:
    """`F.conv2d` of the condition after a nearest resize to `size`. A label map needs no one-hot tensor.

    Args:
        segmap: LabelMap or float (N, channels, H, W).
        weight: (out, channels, k, k); bias (out,) or None.

    Returns:
        (N, out, h', w'), channels-last for a label map. Derivatives exist for weight, bias and a float segmap.
    """
    if isinstance(segmap, Tensor):
        planes = segmap if size is None else resized(segmap, size)
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
    # The accumulation dtype is needed, because the gradient of a row is a sum over thousands of pixels.
    acc_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    responses, bias = tap_responses(segmap, weight.to(acc_dtype)), None if bias is None else bias.to(acc_dtype)
    rows = ops.gather_sum(responses, bias, seen.windows, *uses, False)
    # Every pixel copies its row. This is a gather_sum, too, in which the window of a pixel has one tap.
    pixel_rows = ops.gather_sum(rows.unsqueeze(1), None, seen.pixel_row.view(-1, 1), *pixels, False)
    return pixel_rows.to(_dtype_of_convolution(weight)).view(*seen.pixel_row.shape, -1).permute(0, 3, 1, 2)


def _dtype_of_convolution(weight: Tensor) -> torch.dtype:
    """The dtype of the result of `F.conv2d` with this weight."""
    device = weight.device.type
    if weight.dtype == torch.float64 or not torch.is_autocast_enabled(device):
        return weight.dtype
    return torch.get_autocast_dtype(device)


def resized(planes: Tensor, size: Sequence[int]) -> Tensor:
    """Resizes planes (nearest). Planes that have the size already are returned as they are; PyTorch copies them."""
    return planes if planes.shape[2:] == tuple(size) else F.interpolate(planes, size=tuple(size), mode="nearest")


def tap_responses(segmap: LabelMap, weight: Tensor) -> Tensor:
    """(codes, k*k, out): the convolution's response to each code at each tap."""
    by_channel = _by_tap(weight)
    return segmap.codebook_matmul(by_channel.flatten(1)).view(segmap.num_codes, *by_channel.shape[1:])


def _by_tap(weight: Tensor) -> Tensor:
    """A convolution weight (out, in, k, k) as (in, k*k, out)."""
    # One matrix transpose: torch copies a transposed matrix in blocks, but a permuted tensor element by element.
    return weight.flatten(1).t().contiguous().view(weight.shape[1], -1, weight.shape[0])
