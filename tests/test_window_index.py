"""The integer half: nearest resize, interning of windows, numbering of rows."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from spade_kernels import ops, reference
from spade_kernels.testing import MASK_KINDS, random_labels

pytestmark = pytest.mark.usefixtures("backend")

CONVOLUTIONS = [(1, 1, 0), (3, 1, 1), (5, 1, 2), (4, 2, 2), (3, 2, 1), (3, 1, 0), (7, 3, 5)]


def padded_windows(ids: torch.Tensor, size, kernel_size: int, stride: int, padding: int) -> torch.Tensor:
    """(N, h', w', k*k): every pixel's window, by F.interpolate and F.unfold of the ids as numbers."""
    resized = F.interpolate(ids.unsqueeze(1).double(), size=size, mode="nearest")
    columns = F.unfold(resized, kernel_size, stride=stride, padding=padding)
    height, width = ((s + 2 * padding - kernel_size) // stride + 1 for s in size)
    return columns.transpose(1, 2).reshape(len(ids), height, width, -1).long()


def check_index(ids: torch.Tensor, size, kernel_size: int, stride: int, padding: int) -> None:
    ((windows, pixel_row, image_offsets),) = ops.window_index(ids, [size], kernel_size, stride, padding)
    expected = padded_windows(ids, size, kernel_size, stride, padding)
    assert torch.equal(windows[pixel_row], expected)
    assert image_offsets[0] == 0
    assert image_offsets[-1] == len(windows)
    for image, rows in enumerate(pixel_row.flatten(1).tolist()):
        first, end = image_offsets[image].item(), image_offsets[image + 1].item()
        assert list(dict.fromkeys(rows)) == list(range(first, end))
        assert len(windows[first:end].unique(dim=0)) == end - first


def assert_equal(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_nearest_resize_equals_interpolate():
    for source in range(1, 41):
        ids = torch.arange(1, source + 1).view(1, source, 1)
        for target in range(1, 41):
            ((windows, pixel_row, _),) = ops.window_index(ids, [(target, 1)], 1, 1, 0)
            expected = F.interpolate(ids.unsqueeze(1).float(), size=(target, 1), mode="nearest").flatten()
            assert windows[pixel_row].flatten().tolist() == expected.tolist(), (source, target)


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), CONVOLUTIONS)
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_windows_are_those_of_a_convolution(kind, kernel_size, stride, padding):
    ids = random_labels(kind, (3, 13, 10), 6) + 1
    for size in [(13, 10), (7, 7), (20, 31)]:
        check_index(ids, size, kernel_size, stride, padding)


@pytest.mark.parametrize(("kernel_size", "stride", "padding"), CONVOLUTIONS[1:5])
@pytest.mark.parametrize("kind", MASK_KINDS)
def test_sizes_and_levels_at_once(kind, kernel_size, stride, padding):
    """Two levels at once equal one by one: a level of windows is the map of ids for the next."""
    ids = random_labels(kind, (3, 13, 10), 6) + 1
    # More than one launch takes on a GPU.
    sizes = [(13, 10), (7, 7), (20, 31), *((8 + i, 9) for i in range(8))]
    found = ops.window_index(ids, sizes, kernel_size, stride, padding, levels=2)
    assert len(found) == 2 * len(sizes)
    for size, first, second in zip(sizes, found[::2], found[1::2], strict=True):
        (expected,) = ops.window_index(ids, [size], kernel_size, stride, padding)
        assert_equal(first, expected)
        (expected,) = ops.window_index(first[1] + 1, [first[1].shape[1:]], kernel_size, stride, padding)
        assert_equal(second, expected)
        check_index(first[1] + 1, first[1].shape[1:], kernel_size, stride, padding)


@settings(derandomize=True, deadline=None, max_examples=60)
@given(
    kind=st.sampled_from(MASK_KINDS),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 14), st.integers(1, 14)),
    size=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    convolution=st.sampled_from(CONVOLUTIONS[:5]),
    num_labels=st.sampled_from([1, 2, 200]),
    seed=st.integers(0, 9),
)
def test_any_map(kind, shape, size, convolution, num_labels, seed):
    kernel_size, _, padding = convolution
    if min(size) + 2 * padding >= kernel_size:
        check_index(random_labels(kind, shape, num_labels, seed) + 1, size, *convolution)


@pytest.mark.parametrize("limit", [2**8, 2**16, 2**40])
def test_keys_too_large_for_64_bits_are_renumbered(monkeypatch, limit):
    ids = random_labels("noise", (2, 9, 8), 200) + 1
    ids[1] = ids[0]
    (whole,) = ops.window_index(ids, [(9, 8)], 5, 1, 2)
    monkeypatch.setattr(reference, "_KEY_LIMIT", limit)
    (again,) = ops.window_index(ids, [(9, 8)], 5, 1, 2)
    assert_equal(again, whole)


def test_huge_ids_stay_exact():
    ids = torch.tensor([2**32 - 1, 2**32 - 2, 2**32 - 1, 1]).view(1, 2, 2)
    check_index(ids, (2, 2), 3, 1, 1)


def test_any_strides():
    ids = (random_labels("blobs", (10, 2, 12), 5) + 1).transpose(0, 1)[:, :, ::2]
    check_index(ids, (10, 6), 3, 1, 1)


@pytest.mark.parametrize(("num_values", "values"), [(4, [2, 0, 2, 2, 0]), (1, [0, 0]), (3, [2])])
def test_groups_keep_the_order_of_uses(num_values, values):
    indices, offsets = ops.segments_by_value(torch.tensor(values), num_values)
    segments = [indices[a:b].tolist() for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)]
    assert segments == [[i for i, value in enumerate(values) if value == v] for v in range(num_values)]


@pytest.mark.parametrize("by_each", [ops.segments_of_each, ops.segments_at_once])
def test_groups_of_several(by_each):
    """The segments of several tensors equal those of each alone; a GPU takes `segments_at_once`."""
    values = [
        torch.randint(c, shape) for c, shape in ((5, (2, 3, 4)), (1, (7,)), (99, (50, 9)), (3, (0,)), (4, (1, 1)))
    ]
    counts = [5, 1, 100, 3, 9]
    for value, count, found in zip(values, counts, by_each(values, counts), strict=True):
        assert_equal(found, ops.segments_by_value(value, count))


@pytest.mark.parametrize("counts", [[0, 3, 0, 0, 1, 0], [256, 257, 1, 0, 1000], [0], [0, 0, 5]])
def test_segment_sum(counts):
    values = torch.randn(40, 3, dtype=torch.float64)
    index = torch.randint(40, (sum(counts),))
    offsets = F.pad(torch.tensor(counts).cumsum(0), (1, 0))
    expected = torch.stack([part.sum(0) for part in values[index].split(counts)])
    torch.testing.assert_close(reference.segment_sum(values, index, offsets), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("levels", [1, 2])
def test_windows_that_do_not_fit(levels):
    """Without padding, 3 x 3 windows leave a map that is smaller by 2."""
    ids = torch.ones(1, 5, 5, dtype=torch.int64)
    for size in range(1, 6):
        fits = size >= 1 + 2 * levels
        with contextlib.nullcontext() if fits else pytest.raises(RuntimeError):
            ops.window_index(ids, [(size, size)], 3, 1, 0, levels)
