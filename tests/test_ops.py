"""The registered operators: schemas, fakes, derivatives, determinism."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from spade_kernels import backends, condition, ops, reference
from spade_kernels.layers import SPADE
from spade_kernels.normalization import Statistics
from spade_kernels.testing import forward_backward, random_label_map

pytestmark = pytest.mark.usefixtures("backend")

N, C, H, W, D, K = 2, 2, 5, 4, 3, 3
DOUBLE = {"dtype": torch.float64}
STATS_SCOPES = ("none", "image", "group:1", "batch")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Problem:
    """Arguments of every op for one small label map."""

    def __init__(self, layout: torch.memory_format = torch.contiguous_format, requires_grad: bool = False):
        self.label_map = random_label_map("noise", (N, H, W), 3, edges=True)
        self.index = self.label_map.window_index((H, W), K)
        hidden, rows = self.index
        self.x = torch.randn(N, C, H, W, **DOUBLE).contiguous(memory_format=layout).requires_grad_(requires_grad)

        def random(*shape: int) -> Tensor:
            return torch.randn(*shape, **DOUBLE).requires_grad_(requires_grad)

        self.tap_responses = random(self.label_map.num_codes, K * K, D)
        self.tap_responses.data[0] = 0
        self.bias, self.hidden = random(D), random(len(hidden), D)
        self.gamma, self.beta, self.table_bias = random(C, D, K, K), random(C, D, K, K), random(2 * C)
        self.table, self.dense_table = random(len(rows), 2 * C), random(N * H * W, 2 * C)
        self.kernel, self.sum = torch.randn(D, C, 3, 3, **DOUBLE), torch.randn(N, D, H, W, **DOUBLE)
        self.filter = self.kernel.clone().requires_grad_(requires_grad)
        self.conv = (reference.pack_conv_weight(self.kernel), self.bias.detach())
        self.mean, self.rstd = torch.randn(N, C, **DOUBLE), torch.rand(N, C, **DOUBLE) + 0.5
        self.grad = torch.randn(N, C, H, W, **DOUBLE).contiguous(memory_format=layout)

    def arguments(self, op: str) -> tuple:
        hidden, rows = self.index
        stats = (self.x, self.mean, self.rstd)
        modulate = (*stats, self.table, rows.pixel_row)
        weights = (self.gamma, self.beta)
        return {
            "window_index": (self.label_map.codes, [H + 1, W, H, W], K, 1, K // 2, 2),
            "gather_sum": (self.tap_responses, self.bias, hidden.windows, *hidden.tap_segments, True),
            "gather_sum_grad": (self.hidden.detach(), self.hidden, *hidden.tap_segments, K * K, True),
            "modulation_table": (self.hidden, *weights, self.table_bias, rows.windows, None, *rows.tap_segments),
            "modulation_table_grad": (self.table.detach(), self.hidden, *weights, *rows.tap_segments),
            "pack_modulation_weight": (self.gamma.detach(), self.beta.detach()),
            # The last dimension has one element and the stride of three: its stride means nothing.
            "pack_modulation_weight 3x1": (self.gamma.detach()[..., :1], self.beta.detach()[..., :1]),
            "modulation_table 3x1": (
                *(self.hidden, self.gamma[..., :1], self.beta[..., :1], self.table_bias),
                *(rows.windows[:, :3], None, *ops.segments_by_tap(rows.windows[:, :3], len(hidden) + 1)),
            ),
            "pack_conv_weight": (self.kernel,),
            "conv": (self.x.detach(), *self.conv, self.sum, True),
            "conv 1x1": (
                self.x.detach(),
                reference.pack_conv_weight(self.kernel[..., :1, :1]),
                *self.conv[1:],
                None,
                False,
            ),
            "conv3x3": (self.x, self.filter, self.bias),
            "conv3x3_input_grad": (self.sum, self.kernel),
            "conv3x3_weight_grad": (self.sum, self.x),
            "modulate_conv": (*(a.detach() for a in modulate), 0.2, 1, *self.conv, self.sum),
            "channel_stats": (self.x,),
            "channel_stats_grad": (self.x, self.mean, self.mean, self.rstd),
            "modulate": (*modulate, rows.image_offsets, *rows.row_segments, 0.2, 1, "image"),
            "modulate_table_grad": (self.grad, *modulate, *rows.row_segments, 0.2, 1),
            "modulate_input_grad": (self.grad, *modulate, self.mean, self.rstd, 0.2, 1),
            "modulate dense": (*stats, self.dense_table, None, None, None, None, 1.0, 1, "batch"),
            "modulate_table_grad dense": (self.grad, *stats, self.dense_table, None, None, None, 1.0, 1),
            "modulate_input_grad dense": (self.grad, *stats, self.dense_table, None, None, None, 1.0, 1),
        }[op]


WITHOUT_DERIVATIVES = [
    *("pack_modulation_weight", "pack_modulation_weight 3x1"),
    *("pack_conv_weight", "conv", "conv 1x1", "modulate_conv"),
]
OPS = [
    *("window_index", "gather_sum", "gather_sum_grad"),
    *("modulation_table", "modulation_table 3x1", "modulation_table_grad"),
    *WITHOUT_DERIVATIVES,
    *("channel_stats", "channel_stats_grad", "modulate", "modulate_table_grad", "modulate_input_grad"),
    *("conv3x3", "conv3x3_input_grad", "conv3x3_weight_grad"),
    *("modulate dense", "modulate_table_grad dense", "modulate_input_grad dense"),
]
READS_IMAGES = [op for op in OPS if op.startswith(("channel", "modulate", "conv"))]


def test_every_registered_op_is_listed():
    assert set(backends.kernels_on("cpu")) == {op.split()[0] for op in OPS}


CASES = [(op, "contiguous") for op in OPS] + [(op, "channels_last") for op in READS_IMAGES]


@pytest.mark.parametrize(
    ("op", "layout", "requires_grad"),
    [(*case, False) for case in CASES] + [(*case, True) for case in CASES if "_grad" not in case[0]],
)
def test_opcheck(op, layout, requires_grad):
    operator = getattr(torch.ops.spade_kernels, op.split()[0]).default
    torch.library.opcheck(operator, Problem(LAYOUTS[layout], requires_grad).arguments(op))


class _MallInfo(ctypes.Structure):
    """The result of glibc's mallinfo2."""

    # The eighth value is the number of bytes in use.
    _fields_ = tuple((f"value_{i}", ctypes.c_size_t) for i in range(10))


@pytest.mark.parametrize("op", OPS)
def test_calls_leave_no_memory_behind(op):
    try:
        mallinfo = ctypes.CDLL("libc.so.6").mallinfo2
    except (OSError, AttributeError):
        pytest.skip("needs glibc 2.33 or later, which says how many bytes are in use")
    mallinfo.restype = _MallInfo
    operator = getattr(torch.ops.spade_kernels, op.split()[0])
    calls, arguments = 2000, Problem().arguments(op)
    with torch.no_grad():
        for _ in range(100):
            operator(*arguments)
        before = mallinfo().value_7
        for _ in range(calls):
            operator(*arguments)
    assert mallinfo().value_7 - before < 8 * calls


def check_derivatives(run: Callable[..., Tensor | tuple[Tensor, ...]], *inputs: Tensor) -> None:
    """First and second derivatives, and that the first are the same where they are to be differentiated.

    That also where an argument was made from another: the gradient of one is not the other's.
    """
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)
    results = run(inputs[0], *(t + inputs[0].sum() for t in inputs[1:]))
    total = sum(part.square().sum() for part in (results if isinstance(results, tuple) else (results,)))
    once = torch.autograd.grad(total, inputs, retain_graph=True)
    again = torch.autograd.grad(total, inputs, create_graph=True)
    torch.testing.assert_close(again, once, rtol=1e-11, atol=1e-11)


def test_gradient_of_gather_sum():
    p = Problem(requires_grad=True)
    windows, uses = p.index.hidden.windows, p.index.hidden.tap_segments
    outside = torch.ones(p.label_map.num_codes, 1, 1, **DOUBLE)
    outside[0] = 0
    for relu in (False, True):
        check_derivatives(
            lambda taps, bias, relu=relu: ops.gather_sum(taps * outside, bias, windows, *uses, relu),
            p.tap_responses,
            p.bias,
        )
    check_derivatives(lambda taps: ops.gather_sum(taps * outside, None, windows, *uses, True), p.tap_responses)


def test_gradient_of_modulation_table():
    p = Problem(requires_grad=True)
    windows, uses = p.index.modulation.windows, p.index.modulation.tap_segments
    check_derivatives(
        lambda *floats: ops.modulation_table(*floats, windows, None, *uses), p.hidden, p.gamma, p.beta, p.table_bias
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_channel_stats(layout):
    x = Problem(LAYOUTS[layout], requires_grad=True).x
    check_derivatives(ops.channel_stats, x)
    check_derivatives(lambda x: ops.channel_stats(x)[1], x)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient_of_conv3x3(layout):
    p = Problem(LAYOUTS[layout], requires_grad=True)
    check_derivatives(ops.conv3x3, p.x, p.filter, p.bias)


def statistics_of(x: Tensor, stats_scope: str) -> Statistics:
    if stats_scope == "group:1":
        var, mean = (t[:, None].expand(x.shape[:2]) for t in torch.var_mean(x.detach(), (1, 2, 3), correction=0))
        return Statistics(mean, (var + 1e-5).rsqrt(), stats_scope)
    if stats_scope == "none":
        x = torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x)
    var, mean = torch.var_mean(x.detach(), (2, 3) if stats_scope == "image" else (0, 2, 3), correction=0)
    shape = (-1, x.shape[1])
    return Statistics(mean.view(shape), (var + 1e-5).rsqrt().view(shape), stats_scope)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("negative_slope", [1.0, 0.2])
@pytest.mark.parametrize("stats_scope", STATS_SCOPES)
@pytest.mark.parametrize("dense", [False, True])
def test_gradient_of_modulate(dense, stats_scope, negative_slope, layout):
    p = Problem(LAYOUTS[layout], requires_grad=True)
    rows = p.index.modulation
    where = (None,) * 4 if dense else (rows.pixel_row, rows.image_offsets, *rows.row_segments)

    def run(x: Tensor, table: Tensor) -> Tensor:
        stats = statistics_of(x, stats_scope)
        return ops.modulate(x, stats.mean, stats.rstd, table, *where, negative_slope, 1, stats.stats_scope)

    check_derivatives(run, p.x, p.dense_table if dense else p.table)


@pytest.mark.parametrize("op", WITHOUT_DERIVATIVES)
def test_a_derivative_of_what_stands_still_raises(op):
    arguments = [
        t.clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t
        for t in Problem().arguments(op)
    ]
    with pytest.raises(NotImplementedError, match=f"{op.split()[0]} has no derivatives .* for frozen weights"):
        getattr(torch.ops.spade_kernels, op.split()[0])(*arguments).sum().backward()


@pytest.mark.parametrize("op", [op for op in OPS if op.endswith("_grad")])
def test_a_derivative_of_a_gradient_operator_raises(op):
    arguments = Problem(requires_grad=True).arguments(op)
    result = getattr(torch.ops.spade_kernels, op)(*(a.requires_grad_() if a is arguments[0] else a for a in arguments))
    with pytest.raises(NotImplementedError, match=f"{op} has no derivatives .* differentiate the operator"):
        (result[0] if isinstance(result, tuple) else result).sum().backward()


def test_statistics_that_require_grad_raise():
    p = Problem(requires_grad=True)
    mean, m2 = ops.channel_stats(p.x)
    y = ops.modulate(p.x, mean, (m2 + 1).rsqrt(), p.dense_table)
    with pytest.raises(NotImplementedError, match="must be detached"):
        y.sum().backward()


@pytest.mark.parametrize("op", ["gather_sum", "modulation_table", "modulate"])
def test_backward_without_groups_raises(op):
    p = Problem(requires_grad=True)
    segments = {id(t) for windows in p.index for t in (*windows.tap_segments, *windows.row_segments)}
    arguments = [None if id(a) in segments else a for a in p.arguments(op)]
    y = getattr(torch.ops.spade_kernels, op)(*arguments)
    with pytest.raises(RuntimeError, match=f"{op}: pass `indices` and `offsets`"):
        y.sum().backward()


@pytest.fixture
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_restored_threads")
@pytest.mark.parametrize("config", ["spadeinstance3x3", "spadesyncbatch3x3"])
@pytest.mark.parametrize("kind", ["blobs", "constant", "noise"])
def test_same_bits_every_time(kind, config):
    """Bitwise equal from run to run, with one thread and with two; the index too is built anew."""
    layer = SPADE(config, 24, 8)
    x, grad = torch.randn(2, 24, 40, 40), torch.randn(2, 24, 40, 40)

    def run(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        return forward_backward(partial(layer, segmap=random_label_map(kind, (2, 40, 40), 8)), layer, x, grad)

    first = run(1)
    for repeat in range(10):
        for name, value in run(1 + repeat % 2).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.usefixtures("_restored_threads")
def test_convolution_has_the_same_bits_every_time():
    conv = torch.nn.Conv2d(8, 16, 3)
    x = torch.zeros(())

    def run(threads: int) -> dict[str, Tensor]:
        torch.set_num_threads(threads)
        label_map = random_label_map("blobs", (2, 64, 64), 8)
        grad = torch.linspace(-1, 1, 2 * 16 * 64 * 64).view(2, 16, 64, 64)
        return forward_backward(
            lambda x: x + condition.conv2d(label_map, conv.weight, conv.bias, padding=1), conv, x, grad
        )

    first = run(1)
    for repeat in range(10):
        for name, value in run(1 + repeat % 2).items():
            assert torch.equal(value, first[name]), name
