"""The operators in plain PyTorch: their specification, and the backend that always runs.

The functions run on any device. They compute in the accumulation dtype: float32 for float16, bfloat16 and float32
inputs, and float64 for float64 inputs. Index arguments named `indices, offsets` are the segments of a segment sum:
segment s takes the entries indices[offsets[s]] .. indices[offsets[s + 1] - 1], in that order, so sums are the same from
run to run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

SumOfTaps = Callable[[Tensor, Tensor], Tensor]

_KEY_LIMIT = 2**62
_SEGMENT_CHUNK = 64
# Winograd's transforms: B^T, G, A^T.
_FROM_INPUT = [[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]]
_FROM_WEIGHT = [[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]]
_TO_OUTPUT = [[1, 1, 1, 0], [0, 1, -1, -1]]


def window_index(
    ids: Tensor, sizes: list[int], kernel_size: int, stride: int, padding: int, levels: int
) -> list[Tensor]:
    """Finds the distinct kernel_size x kernel_size windows of each map, resized (nearest) to each of the sizes.

    Args:
        ids: (N, H, W) int64, all positive and below 2**32; 0 is reserved for "outside the image".
        sizes: flat list of height and width of the first size, height and width of the second, ...
        levels: 1, or 2 to find also the windows of the first level's map of rows, pixel_row + 1.

    Returns:
        For each size and each of its levels: windows (rows, kernel_size**2) int64, pixel_row (N, h', w') int64,
        image_offsets (N + 1,) int64. Each row belongs to one image, and rows are numbered by first occurrence.
    """
    found: list[Tensor] = []
    for height, width in zip(sizes[::2], sizes[1::2], strict=True):
        level = _resize_nearest(ids, [height, width])
        for _ in range(levels):
            found += _windows(level, kernel_size, stride, padding)
            level = found[-2] + 1
    return found


def _windows(ids: Tensor, kernel_size: int, stride: int, padding: int) -> tuple[Tensor, Tensor, Tensor]:
    padded = F.pad(ids, (padding,) * 4)
    height, width = ((s - kernel_size) // stride + 1 for s in padded.shape[1:])
    image = torch.arange(ids.shape[0], device=ids.device).view(-1, 1, 1)
    across = [padded[:, :, j::stride][:, :, :width] for j in range(kernel_size)]
    bands = _exact_key(across)
    keys = _exact_key([image, *(bands[:, i::stride][:, :height] for i in range(kernel_size))])
    row, first = _number_by_first_occurrence(keys.flatten())

    side = torch.arange(kernel_size, device=ids.device)
    n, y, x = (t.view(-1, 1, 1) for t in torch.unravel_index(first, (ids.shape[0], height, width)))
    windows = padded[n, y * stride + side.view(1, -1, 1), x * stride + side.view(1, 1, -1)].flatten(1)
    image_offsets = F.pad(torch.bincount(n.flatten(), minlength=ids.shape[0]).cumsum(0), (1, 0))
    return windows, row.view(-1, height, width), image_offsets


def _sum_of_taps(tap_responses: Tensor, windows: Tensor) -> Tensor:
    """(rows, D): sum over t of tap_responses[windows[:, t], t]."""
    steps = torch.arange(tap_responses.shape[1], device=windows.device)
    return F.embedding_bag(windows * tap_responses.shape[1] + steps, tap_responses.flatten(0, 1), mode="sum")


def gather_sum(
    tap_responses: Tensor,
    bias: Tensor | None,
    windows: Tensor,
    indices: Tensor | None,
    offsets: Tensor | None,
    relu: bool,
    *,
    sum_of_taps: SumOfTaps = _sum_of_taps,
) -> Tensor:
    """(rows, D): the first convolution at each distinct window.

    It is the sum over t of tap_responses[windows[:, t], t], plus the bias, followed by a ReLU if `relu` is True.

    Args:
        tap_responses: (codes, T, D), the convolution's response to each code at each tap; tap_responses[0] must be 0.
        windows: (rows, T) int64 codes.
        indices, offsets: the uses of each (code, tap) pair in the windows; needed by the backward only.
    """
    rows = sum_of_taps(accumulator(tap_responses), windows)
    if bias is not None:
        rows = rows + bias
    return (rows.relu() if relu else rows).to(tap_responses.dtype)


def gather_sum_grad(
    grad: Tensor, rows: Tensor, indices: Tensor, offsets: Tensor, num_taps: int, relu: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `tap_responses` (codes, T, D) and `bias` (D,) from the gradient of the rows."""
    grad = accumulator(grad)
    if relu:
        grad = grad * (rows > 0)
    d_tap_responses = segment_sum(grad, indices // num_taps, offsets)
    return d_tap_responses.view(-1, num_taps, grad.shape[1]), grad.sum(0)


def modulation_table(
    hidden: Tensor,
    gamma: Tensor,
    beta: Tensor,
    bias: Tensor,
    windows: Tensor,
    packed_weight: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    *,
    sum_of_taps: SumOfTaps = _sum_of_taps,
) -> Tensor:
    """(rows, 2C): the second convolution at each distinct window.

    It is the sum over t of hidden[windows[:, t] - 1] @ weight[:, t], + bias, gamma's columns first. Each hidden row is
    multiplied by each tap's weights once, however many windows contain it.

    Args:
        hidden: (hidden rows, D).
        gamma, beta: (C, D, k, k); bias: (2C,).
        windows: (rows, k*k) int64, hidden rows counted from 1; an entry of 0 (outside the image) contributes nothing.
        packed_weight: gamma and beta packed by `pack_modulation_weight`, or None; not used by the reference.
        indices, offsets: the uses of each (hidden row, tap) pair in the windows; needed by the backward only.
    """
    acc = F.pad(accumulator(hidden), (0, 0, 1, 0))
    weight = joint_weight(gamma, beta).to(acc.dtype)
    products = (acc @ weight.flatten(1)).view(-1, *weight.shape[1:])
    return (sum_of_taps(products, windows) + bias).to(hidden.dtype)


def modulation_table_grad(
    grad: Tensor, hidden: Tensor, gamma: Tensor, beta: Tensor, indices: Tensor, offsets: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `hidden`, `gamma`, `beta` and `bias` from the gradient of the table."""
    grad = accumulator(grad)
    hidden = hidden.to(grad.dtype)
    weight = joint_weight(gamma, beta).to(grad.dtype)
    num_taps = weight.shape[1]
    tap_grads = segment_sum(grad, indices // num_taps, offsets)[num_taps:].view(len(hidden), -1)
    # Products are summed in runs of rows, because one long sum would be less accurate than a convolution's weight
    # gradient.
    runs = zip(hidden.split(_SEGMENT_CHUNK), tap_grads.split(_SEGMENT_CHUNK), strict=True)
    d_weight = sum((h.t() @ t for h, t in runs), torch.zeros_like(weight).flatten(1)).view_as(weight).permute(2, 0, 1)
    d_gamma, d_beta = (part.reshape(gamma.shape) for part in d_weight.split(len(gamma)))
    return tap_grads @ weight.flatten(1).t(), d_gamma.contiguous(), d_beta.contiguous(), grad.sum(0)


def pack_modulation_weight(gamma: Tensor, beta: Tensor) -> Tensor:
    """(panels, T, D, 32): gamma's and beta's weights (C, D, k, k) in panels of 32 output columns.

    The last panel is padded with 0. `modulation_table` packs the weights in every call unless it is given packed ones.
    On a CPU the result is contiguous, in the accumulation dtype; on a GPU it has the weights' dtype, and D is innermost
    in memory, as tensor cores read it.
    """
    columns = torch.cat((gamma, beta)).flatten(2)
    columns = F.pad(columns, (0, 0, 0, 0, 0, -len(columns) % 32)).unflatten(0, (-1, 32))
    if gamma.is_cuda:
        return columns.transpose(2, 3).contiguous().permute(0, 2, 3, 1)
    return accumulator(columns).permute(0, 3, 2, 1).contiguous()


def joint_weight(gamma: Tensor, beta: Tensor) -> Tensor:
    """(D, T, 2C): the weights of gamma, then beta."""
    return torch.cat((gamma, beta)).flatten(2).permute(1, 2, 0)


def channel_stats(x: Tensor) -> tuple[Tensor, Tensor]:
    """(N, C) mean and sum of squared deviations of each image's channels, in two passes over x (N, C, h, w)."""
    acc = accumulator(x)
    mean = acc.mean((2, 3))
    return mean, (acc - mean[:, :, None, None]).square().sum((2, 3))


def channel_stats_grad(x: Tensor, mean: Tensor, grad_mean: Tensor, grad_m2: Tensor) -> Tensor:
    """Gradient of x from the gradients of its statistics."""
    acc = accumulator(x)
    pixels = x.shape[2] * x.shape[3]
    centred = acc - mean[:, :, None, None]
    return (grad_mean[:, :, None, None] / pixels + 2 * grad_m2[:, :, None, None] * centred).to(x.dtype)


def modulate(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    image_offsets: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    negative_slope: float,
    upsample: int,
    stats_scope: str,
) -> Tensor:
    """leaky_relu((x - mean) * rstd * scale + shift, negative_slope), scale and shift gathered from the table.

    Args:
        x: (N, C, h / upsample, w / upsample); mean, rstd: (N, C) or (1, C).
        table: (rows, 2C), scale then shift. pixel_row: (N, h, w) int64, or None: one row per pixel in order.
        negative_slope: slope of the leaky ReLU; 1 for none.
        upsample: 1, or 2: every pixel of x stands for 2 x 2 pixels (nearest upsampling).
        image_offsets, indices, offsets, stats_scope: needed by the backward only; see `ops.modulate`.

    Returns:
        (N, C, h, w) in x's dtype, channels-last.
    """
    y, _, _ = _affine(x, mean, rstd, table, pixel_row, upsample)
    y = F.leaky_relu(y, negative_slope) if negative_slope != 1 else y
    return y.to(x.dtype).permute(0, 3, 1, 2)


def modulate_table_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    indices: Tensor | None,
    offsets: Tensor | None,
    negative_slope: float,
    upsample: int,
) -> Tensor:
    """Gradient of the table, (rows, 2C), in the accumulation dtype: sums over each row's pixels."""
    y, xhat, _ = _affine(x, mean, rstd, table, pixel_row, upsample)
    d_shift = _through_leaky_relu(grad, y, negative_slope)
    per_pixel = torch.cat((d_shift * xhat, d_shift), -1).flatten(0, 2)
    if pixel_row is None:
        return per_pixel
    assert indices is not None
    assert offsets is not None
    return segment_sum(per_pixel, indices, offsets)


def modulate_input_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    table: Tensor,
    pixel_row: Tensor | None,
    mean_shift: Tensor | None,
    mean_scale: Tensor | None,
    negative_slope: float,
    upsample: int,
) -> Tensor:
    """Gradient of x, channels-last, in x's dtype.

    Args:
        mean_shift, mean_scale: (N, C) or (1, C) means of d(xhat) and of d(xhat) * xhat over the pixels of y that mean
            and rstd cover; None if mean and rstd do not depend on x.
    """
    y, xhat, scale = _affine(x, mean, rstd, table, pixel_row, upsample)
    d_xhat = _through_leaky_relu(grad, y, negative_slope) * scale
    if mean_shift is not None and mean_scale is not None:
        d_xhat = d_xhat - mean_shift[:, None, None] - xhat * mean_scale[:, None, None]
    d_x = d_xhat * rstd[:, None, None]
    if upsample != 1:
        d_x = d_x.unflatten(2, (-1, upsample)).unflatten(1, (-1, upsample)).sum((2, 4))
    return d_x.to(x.dtype).permute(0, 3, 1, 2)


def pack_conv_weight(weight: Tensor) -> Tensor:
    """(points, panels, C, 32): a convolution weight (out, C, k, k) in panels of 32 output columns.

    k is 1 or 3, and the last panel is padded with 0. For k = 1 there is one point, the weight itself. For k = 3 there
    are 16 points, the elements of G g G^T for the 3 x 3 kernel g of every pair of channels (Lavin and Gray 2016). The
    result is in the accumulation dtype.
    """
    g = F.pad(weight.double(), (0, 0, 0, 0, 0, 0, 0, -len(weight) % 32))
    if g.shape[-1] == 3:
        transform = g.new_tensor(_FROM_WEIGHT)
        g = torch.einsum("ik, ockl, jl -> ocij", transform, g, transform)
    packed_weight = g.flatten(2).unflatten(0, (-1, 32)).permute(3, 0, 2, 1)
    return packed_weight.to(accumulator(weight).dtype).contiguous()


def conv(x: Tensor, packed_weight: Tensor, bias: Tensor, add: Tensor | None, relu: bool) -> Tensor:
    """(N, out, h, w), channels-last: F.conv2d(x, weight, bias, padding=k // 2) + add.

    A 3 x 3 convolution is Winograd's F(2 x 2, 3 x 3): a tile of 2 x 2 outputs is A^T (G g G^T * B^T d B) A, where g is
    the kernel, d are the 4 x 4 inputs of the tile, and * is elementwise. This takes 16 products per pair of channels
    instead of 36. An Inf or NaN in x reaches all outputs of the tiles that read it.

    Args:
        x: (N, C, h, w).
        packed_weight: result of `pack_conv_weight` for a weight (out, C, k, k).
        bias: (out,).
        add: (N, out, h, w) or None.
        relu: True applies a ReLU to the result.
    """
    acc = accumulator(x)
    weight = packed_weight.to(acc.dtype).transpose(1, 2).flatten(2)[..., : len(bias)]
    if len(weight) == 1:
        y = torch.einsum("nchw, co -> nohw", acc, weight[0])
    else:
        y = _winograd(acc, weight.unflatten(0, (4, 4)))
    y = y + bias.to(acc.dtype)[:, None, None]
    y = y if add is None else y + add
    return (y.relu() if relu else y).to(x.dtype).contiguous(memory_format=torch.channels_last)


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
    add: Tensor | None,
) -> Tensor:
    """`conv` of the result of `modulate`, which a backend need not store."""
    y = modulate(x, mean, rstd, table, pixel_row, None, None, None, negative_slope, upsample, "none")
    return conv(y, packed_weight, bias, add, False)


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """(N, out, h, w), channels-last: F.conv2d of x (N, C, h, w), weight (out, C, 3, 3), bias (out,), with padding 1."""
    acc = accumulator(x)
    y = F.conv2d(acc, weight.to(acc.dtype), bias.to(acc.dtype), padding=1)
    return y.to(x.dtype).contiguous(memory_format=torch.channels_last)


def conv3x3_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """Gradient of x, channels-last, from the gradient of the convolution's result."""
    acc = accumulator(grad)
    d_x = F.conv_transpose2d(acc, weight.to(acc.dtype), padding=1)
    return d_x.to(grad.dtype).contiguous(memory_format=torch.channels_last)


def conv3x3_weight_grad(grad: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, in the accumulation dtype, from the gradient of the convolution's result."""
    grad = accumulator(grad)
    x = x.to(grad.dtype)
    shape = grad.new_empty(grad.shape[1], x.shape[1], 3, 3)
    d_weight = torch.ops.aten.convolution_backward(
        grad, x, shape, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [False, True, False]
    )[1]
    return d_weight.contiguous(), grad.sum((0, 2, 3))


def _winograd(x: Tensor, points: Tensor) -> Tensor:
    """(N, out, h, w) of x (N, C, h, w) and a weight's points (4, 4, C, out)."""
    height, width = x.shape[2:]
    tiles = F.pad(x, (1, 1 + width % 2, 1, 1 + height % 2)).unfold(2, 4, 2).unfold(3, 4, 2)
    from_input, to_output = x.new_tensor(_FROM_INPUT), x.new_tensor(_TO_OUTPUT)
    inputs = torch.einsum("ik, ncyxkl, jl -> ijnyxc", from_input, tiles, from_input)
    products = torch.einsum("ijnyxc, ijco -> ijnyxo", inputs, points)
    outputs = torch.einsum("ki, ijnyxo, lj -> noykxl", to_output, products, to_output)
    return outputs.flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def segment_sum(values: Tensor, index: Tensor, offsets: Tensor) -> Tensor:
    """(segments, D): sums of values[index[e]] over each segment; a long one is summed in chunks, then over these."""
    while offsets.diff().max() > _SEGMENT_CHUNK:
        chunks = (offsets.diff() + _SEGMENT_CHUNK - 1) // _SEGMENT_CHUNK
        chunk_starts = F.pad(chunks.cumsum(0), (1, 0))
        every = torch.arange(int(chunk_starts[-1]), device=offsets.device)
        segment = torch.repeat_interleave(torch.arange(len(chunks), device=offsets.device), chunks)
        within = every - chunk_starts[segment]
        offsets = torch.cat((offsets[segment] + within * _SEGMENT_CHUNK, offsets[-1:]))
        values = F.embedding_bag(index, values, offsets, mode="sum", include_last_offset=True)
        index, offsets = every, chunk_starts
    return F.embedding_bag(index, values, offsets, mode="sum", include_last_offset=True)


def accumulator(t: Tensor) -> Tensor:
    return t if t.dtype == torch.float64 else t.float()


def _resize_nearest(ids: Tensor, size: list[int]) -> Tensor:
    if list(ids.shape[1:]) == list(size):
        return ids
    y, x = (
        F.interpolate(torch.arange(n, dtype=torch.float32, device=ids.device).view(1, 1, n), size=int(m))
        .long()
        .flatten()
        for n, m in zip(ids.shape[1:], size, strict=True)
    )
    return ids[:, y][:, :, x]


def _exact_key(parts: list[Tensor]) -> Tensor:
    """One integer per position, equal exactly where all parts are equal; it is not a hash."""
    key, bound = parts[0], int(parts[0].max()) + 1
    for part in parts[1:]:
        states = int(part.max()) + 1
        if bound * states > _KEY_LIMIT:
            values, key = torch.unique(key, return_inverse=True)
            bound = len(values)
        key, bound = key * states + part, bound * states
    return key


def _number_by_first_occurrence(keys: Tensor) -> tuple[Tensor, Tensor]:
    """The number of each key, counted by first occurrence, and where each number occurs first."""
    ordered, order = keys.sort(stable=True)
    new = F.pad(ordered[1:] != ordered[:-1], (1, 0), value=True)
    first, by_first = order[new].sort()
    number = torch.empty_like(by_first)
    number[by_first] = torch.arange(len(first), device=keys.device)
    row = torch.empty_like(order)
    row[order] = number[new.cumsum(0) - 1]
    return row, first


def _affine(
    x: Tensor, mean: Tensor, rstd: Tensor, table: Tensor, pixel_row: Tensor | None, upsample: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y before the activation, normalized x and scale, all (N, h, w, C)."""
    pixels = accumulator(x).permute(0, 2, 3, 1).contiguous()
    if upsample != 1:
        pixels = pixels.repeat_interleave(upsample, 1).repeat_interleave(upsample, 2)
    mean, rstd = mean.to(pixels.dtype), rstd.to(pixels.dtype)
    xhat = (pixels - mean[:, None, None]) * rstd[:, None, None]
    rows = table.to(xhat.dtype)
    rows = rows.view(*xhat.shape[:3], -1) if pixel_row is None else F.embedding(pixel_row, rows)
    scale, shift = rows.chunk(2, -1)
    return xhat * scale + shift, xhat, scale


def _through_leaky_relu(grad: Tensor, y: Tensor, negative_slope: float) -> Tensor:
    grad = grad.permute(0, 2, 3, 1).to(y.dtype).contiguous()
    return grad if negative_slope == 1 else torch.where(y > 0, grad, grad * negative_slope)
