"""The SPADE layer on the Triton kernels, through the registered operators and their derivatives."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from spade_kernels import StaticLabelMap, backends, ops
from spade_kernels.functional import use_path
from spade_kernels.testing import (
    forward_backward,
    random_label_map,
    random_spade,
    relative_error,
    stock_spade,
)

CLASSES, CHANNELS, SIZE = 3, 20, (4, 5)


@pytest.fixture(autouse=True)
def _on_triton(device):
    """Puts the Triton kernels over all others, for tensors of the device at hand."""
    library = torch.library.Library("spade_kernels", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
        for name in backends.operators_of("triton"):
            if name != "pack_modulation_weight":
                kernel = backends._python_kernel(name, "triton")
                library.impl(name, kernel, device.upper(), allow_override=True)
    # Exact products: what tf32 costs is for the error budget.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield
    library._destroy()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("path", ["windows", "dense"])
@pytest.mark.parametrize("config", ["spadeinstance3x3", "spadebatch3x3", "spadebatch1x1"])
def test_equals_the_stock_layer(config, path, upsample, dtype, device):
    """Output and gradients. That float32 errs no more than it may is for the kernels' own tests."""
    mask = random_label_map("blobs", (2, 5, 7), CLASSES, edges=True)
    layer = random_spade(config, CHANNELS, CLASSES + 1)
    x, grad = torch.randn(2, CHANNELS, *SIZE), torch.randn(2, CHANNELS, SIZE[0] * upsample, SIZE[1] * upsample)
    planes, up = mask.one_hot(torch.float64), torch.nn.Upsample(scale_factor=upsample)
    exact_layer = copy.deepcopy(layer).double()
    exact = forward_backward(lambda x: stock_spade(exact_layer, up(x), planes), exact_layer, x.double(), grad)
    layer, mask = layer.to(device, dtype), mask.to(device)
    with use_path(path):
        got = forward_backward(lambda x: layer(x, mask, upsample=upsample), layer, x.to(device, dtype), grad.to(device))
    for name, value in exact.items():
        assert relative_error(got[name].cpu(), value) < (1e-12 if dtype == torch.float64 else 1e-5), name


def test_rows_to_spare(device):
    """Rows that no pixel uses, as in a CUDA graph, change nothing."""
    masks = [random_label_map(kind, (2, *SIZE), CLASSES).to(device) for kind in ("islands", "constant")]
    layer = random_spade("spadeinstance3x3", CHANNELS, CLASSES).to(device)
    x, grad = torch.randn(2, 2, CHANNELS, *SIZE, device=device)
    place = StaticLabelMap(masks[0].prepare([SIZE]))
    for mask in masks:
        with use_path("windows"):
            expected = forward_backward(lambda x, mask=mask: layer(x, mask), layer, x, grad)
            got = forward_backward(lambda x, mask=mask: layer(x, place.copy_(mask)), layer, x, grad)
        for name, value in expected.items():
            assert relative_error(got[name], value) < 1e-5, name


def test_fakes_have_the_kernels_layouts(device):
    """Shapes, strides and dtypes of what compiled code is told to expect."""
    x = torch.randn(2, CHANNELS, *SIZE, device=device).contiguous(memory_format=torch.channels_last)
    mask = random_label_map("blobs", (2, *SIZE), CLASSES).to(device)
    rows = mask.window_index(SIZE, 3).modulation
    table = torch.randn(len(rows), 2 * CHANNELS, device=device)
    mean, m2 = ops.channel_stats(x)
    where = (table, rows.pixel_row)
    index = mask.window_index(SIZE, 3)
    taps, gamma = torch.randn(mask.num_codes, 9, 16, device=device), torch.randn(CHANNELS, 16, 3, 3, device=device)
    hidden = ops.gather_sum(taps, taps[0, 0], index.hidden.windows, *index.hidden.tap_segments, True)
    of_table = (hidden, gamma, gamma)
    for operator, arguments in (
        ("gather_sum", (taps, taps[0, 0], index.hidden.windows, *index.hidden.tap_segments, True)),
        ("gather_sum_grad", (hidden, hidden, *index.hidden.tap_segments, 9, True)),
        ("modulation_table", (*of_table, table[0], rows.windows, None, *rows.tap_segments)),
        ("modulation_table_grad", (table, *of_table, *rows.tap_segments)),
        ("channel_stats", (x,)),
        ("channel_stats_grad", (x, mean, mean, m2)),
        ("channel_stats_grad", (x.contiguous(), mean, mean, m2)),
        ("modulate", (x, mean, m2, *where, rows.image_offsets, *rows.row_segments, 0.2, 1, "none")),
        ("modulate_table_grad", (x, x, mean, m2, *where, *rows.row_segments, 0.2, 1)),
        ("modulate_input_grad", (x, x, mean, m2, *where, mean, mean, 0.2, 1)),
    ):
        torch.library.opcheck(getattr(torch.ops.spade_kernels, operator).default, arguments)
