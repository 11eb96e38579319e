"""The convolutions of frozen networks against `F.conv2d`, and against it after `modulate`."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import spade_kernels as sk
from spade_kernels import backends, functional, ops
from spade_kernels.convolution import Conv2d, PackedConv2d
from spade_kernels.layers import SPADE, spade_conv
from spade_kernels.testing import (
    assert_within_budget,
    forward_backward,
    random_label_map,
    random_spade,
    relative_error,
    stock_spade,
)

# One row of tiles is more than a task takes, or several rows are less.
SIZES = [(1, 1), (1, 7), (2, 2), (5, 3), (12, 12), (17, 9), (5, 301)]
CHANNELS = [(1, 1), (3, 33), (16, 32), (31, 5), (130, 70)]
KERNELS = [1, 3]
COMPILED = pytest.mark.skipif(backends.can_run_cpu() is not None, reason=f"{backends.can_run_cpu()}")


class Problem:
    """A convolution of k x k, something to add to it, and what it equals."""

    def __init__(self, channels: int, out: int, k: int, size: tuple[int, int], dtype: torch.dtype = torch.float64):
        torch.manual_seed(0)
        self.x = torch.randn(2, channels, *size, dtype=dtype)
        self.weight, self.bias = torch.randn(out, channels, k, k, dtype=dtype), torch.randn(out, dtype=dtype)
        self.add = torch.randn(2, out, *size, dtype=dtype)
        self.packed_weight = ops.pack_conv_weight(self.weight)

    def stock(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, padding=self.weight.shape[-1] // 2)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("channels", "out"), CHANNELS)
@pytest.mark.parametrize("k", KERNELS)
def test_equals_the_stock_convolution(k, channels, out, size):
    p = Problem(channels, out, k, size)
    assert relative_error(ops.conv(p.x, p.packed_weight, p.bias), p.stock(p.x)) < 1e-12
    got = ops.conv(p.x.contiguous(memory_format=torch.channels_last), p.packed_weight, p.bias, p.add, relu=True)
    assert relative_error(got, (p.stock(p.x) + p.add).relu()) < 1e-12
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    ("channels", "out", "size"), [(3, 33, (1, 2)), (70, 40, (6, 5)), (16, 32, (11, 4)), (4, 8, (3, 301))]
)
@pytest.mark.parametrize("k", KERNELS)
def test_equals_the_stock_convolution_of_what_is_modulated(k, channels, out, size, dense, upsample):
    p = Problem(channels, out, k, size)
    large = tuple(upsample * s for s in size)
    index = random_label_map("noise", (2, *large), 5).window_index(large, 3).modulation
    rows = 2 * large[0] * large[1] if dense else len(index)
    table = torch.randn(rows, 2 * channels, dtype=torch.float64)
    pixel_row = None if dense else index.pixel_row
    for images in (1, 2):
        mean, rstd = (torch.rand(images, channels, dtype=torch.float64) + 0.5 for _ in range(2))
        y = ops.modulate(p.x, mean, rstd, table, pixel_row, negative_slope=0.2, upsample=upsample)
        add = torch.randn_like(p.stock(y))
        got = ops.modulate_conv(p.x, mean, rstd, table, pixel_row, 0.2, upsample, p.packed_weight, p.bias, add)
        assert relative_error(got, p.stock(y) + add) < 1e-12


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("channels", "out", "size"), [(64, 32, 40), (256, 64, 16), (1024, 32, 12)])
@pytest.mark.parametrize("k", KERNELS)
def test_error_is_within_twice_the_stock_convolutions(k, channels, out, size, dtype):
    p = Problem(channels, out, k, (size, size), dtype)
    stock = p.stock(p.x.contiguous(memory_format=torch.channels_last))
    got = ops.conv(p.x, p.packed_weight, p.bias)
    exact = F.conv2d(p.x.double(), p.weight.double(), p.bias.double(), padding=k // 2)
    assert got.dtype == dtype
    for error in (lambda y: (y.double() - exact).norm(), lambda y: (y.double() - exact).abs().max()):
        assert error(got) <= 2 * error(stock)


# More tiles, in the last case, than the weight's gradient takes at once.
@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(
    ("channels", "out", "size"), [(3, 33, (1, 2)), (70, 40, (7, 6)), (50, 17, (12, 9)), (3, 5, (130, 121))]
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_equal_the_stock_convolutions(layout, channels, out, size):
    p = Problem(channels, out, 3, size)
    gradients = []
    for run in (ops.conv3x3, lambda x, weight, bias: F.conv2d(x, weight, bias, padding=1)):
        leaves = [t.clone(memory_format=layout).requires_grad_() for t in (p.x, p.weight)]
        leaves.append(p.bias.clone().requires_grad_())
        run(*leaves).backward(p.add.contiguous(memory_format=layout))
        gradients.append([leaf.grad for leaf in leaves])
    for got, expected in zip(*gradients, strict=True):
        assert relative_error(got, expected) < 1e-12


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize(("channels", "out", "size"), [(64, 32, 40), (256, 64, 32), (512, 64, 23)])
def test_gradients_error_is_within_twice_the_stock_convolutions(channels, out, size):
    p = Problem(channels, out, 3, (size, size), torch.float32)

    def gradients(run, dtype: torch.dtype) -> list[Tensor]:
        leaves = [
            t.to(dtype, memory_format=torch.channels_last).requires_grad_() for t in (p.x.clone(), p.weight.clone())
        ]
        leaves.append(p.bias.detach().clone().to(dtype).requires_grad_())
        run(*leaves).backward(p.add.to(dtype, memory_format=torch.channels_last))
        return [leaf.grad for leaf in leaves]

    def stock(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return F.conv2d(x, weight, bias, padding=1)

    parts = (gradients(ops.conv3x3, torch.float32), gradients(stock, torch.float32), gradients(stock, torch.float64))
    for got, theirs, exact in zip(*parts, strict=True):
        for error in (lambda y, exact=exact: (y - exact).norm(), lambda y, exact=exact: (y - exact).abs().max()):
            assert error(got) <= 2 * error(theirs)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("k", KERNELS)
def test_weights_in_any_layout(k):
    p = Problem(20, 40, k, (1, 1))
    assert torch.equal(ops.pack_conv_weight(p.weight.contiguous(memory_format=torch.channels_last)), p.packed_weight)
    assert torch.equal(ops.pack_conv_weight(p.weight.transpose(2, 3).contiguous().transpose(2, 3)), p.packed_weight)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_tiles(value):
    p = Problem(16, 32, 3, (20, 20))
    finite = ops.conv(p.x, p.packed_weight, p.bias)
    p.x[0, 3, 9, 10] = value
    got = ops.conv(p.x, p.packed_weight, p.bias)
    spoilt = ~got.isfinite().any(1)
    assert spoilt[0, 8:11, 9:12].all(), "stock has it there"
    spoilt[0, 8:12, 8:12] = False
    assert not spoilt.any()
    assert torch.equal(got[0, :, :8], finite[0, :, :8])
    assert torch.equal(got[0, :, 12:], finite[0, :, 12:])
    assert torch.equal(got[1], finite[1])
    if value != value:
        for k in KERNELS:
            packed_weight = p.packed_weight if k == 3 else ops.pack_conv_weight(p.weight[:, :, :1, :1])
            assert ops.conv(p.x, packed_weight, p.bias, relu=True)[0, :, 9, 10].isnan().all()


@pytest.fixture
def _restored_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("backend", "_restored_threads")
@pytest.mark.parametrize(("channels", "out", "size"), [(48, 80, (31, 33)), (512, 256, (12, 12))])
@pytest.mark.parametrize("k", KERNELS)
def test_same_bits_every_time(k, channels, out, size):
    p = Problem(channels, out, k, size, torch.float32)
    torch.set_num_threads(1)
    first = ops.conv(p.x, p.packed_weight, p.bias, p.add)
    for repeat in range(20):
        torch.set_num_threads(1 + repeat % 2)
        assert torch.equal(ops.conv(p.x, p.packed_weight, p.bias, p.add), first)


@pytest.mark.usefixtures("backend", "_restored_threads")
@pytest.mark.parametrize(("channels", "out", "size"), [(48, 80, (31, 33)), (512, 256, (12, 12))])
def test_gradients_have_the_same_bits_every_time(channels, out, size):
    p = Problem(channels, out, 3, size, torch.float32)
    leaves = [t.requires_grad_() for t in (p.x, p.weight, p.bias)]

    def gradients(threads: int) -> tuple[Tensor, ...]:
        torch.set_num_threads(threads)
        return torch.autograd.grad(ops.conv3x3(*leaves), leaves, p.add)

    first = gradients(1)
    for repeat in range(10):
        assert all(torch.equal(*pair) for pair in zip(gradients(1 + repeat % 2), first, strict=True))


@pytest.mark.usefixtures("backend")
def test_bad_shapes_raise():
    p = Problem(16, 32, 3, (8, 8))
    for arguments in ((p.x[:, :15], p.packed_weight, p.bias), (p.x, p.packed_weight, p.bias, p.add[:, :31])):
        with pytest.raises(RuntimeError):
            ops.conv(*arguments)


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("k", KERNELS)
def test_no_images(k):
    p = Problem(16, 32, k, (8, 8))
    assert ops.conv(p.x[:0], p.packed_weight, p.bias).shape == (0, 32, 8, 8)
    weight = p.weight.requires_grad_()
    if k == 3:
        ops.conv3x3(p.x[:0], weight, p.bias).sum().backward()
        assert torch.equal(weight.grad, torch.zeros_like(weight))


@COMPILED
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("k", KERNELS)
@torch.no_grad()
def test_packed_convolutions_take_every_input(k, has_bias, relu):
    """Laid out for this operator, and then asked for what only the weight itself can do."""
    p = Problem(16, 33, k, (16, 16), torch.float32)
    bias = p.bias if has_bias else None
    convolution = PackedConv2d(p.weight, bias, [k // 2] * 2, relu=relu)
    convolution(p.x)
    assert type(convolution._weight).__name__ == "_Panels"

    def expected(x: Tensor, add: Tensor) -> Tensor:
        exact = None if bias is None else bias.double()
        y = F.conv2d(x.double(), p.weight.double(), exact, padding=k // 2) + add.double()
        return y.relu() if relu else y

    small, small_add = p.x[:, :, :3, :2], p.add[:, :, :3, :2]
    assert relative_error(convolution(p.x, p.add), expected(p.x, p.add)) < 1e-6
    assert relative_error(convolution(small, small_add), expected(small, small_add)) < 1e-6
    assert relative_error(convolution(p.x.double(), p.add.double()), expected(p.x, p.add)) < 1e-6
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_error(convolution(p.x, p.add), expected(p.x, p.add)) < 1e-2


@COMPILED
@pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning")
@pytest.mark.parametrize("spectral", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("k", "size"), [(1, 40), (3, 40), (3, 20)])
def test_training_convolutions_have_the_stock_ones_gradients(k, size, has_bias, spectral, monkeypatch):
    """Large ones take this operator."""
    called = []
    monkeypatch.setattr(ops, "conv3x3", lambda *args: called.append(args) or torch.ops.spade_kernels.conv3x3(*args))
    torch.manual_seed(0)
    stock = torch.nn.Conv2d(16, 32, k, padding=k // 2, bias=has_bias)
    stock = torch.nn.utils.spectral_norm(stock) if spectral else stock
    ours = Conv2d(16, 32, k, padding=k // 2, bias=has_bias, spectral=spectral)
    ours.load_state_dict(stock.state_dict())
    stock.double()
    x = torch.randn(1, 16, size, size)
    add = torch.randn(1, 32, size, size)
    results = []
    for module, dtype in ((ours, torch.float32), (stock, torch.float64)):
        leaf = x.detach().clone().to(dtype).requires_grad_()
        y = module(leaf, add=add) if module is ours else module(leaf) + add
        y.square().mean().backward()
        results.append({"y": y, "x": leaf.grad, **{name: p.grad for name, p in module.named_parameters()}})
    got, expected = results
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert got[name].shape == value.shape
        assert relative_error(got[name], value) < 1e-5, name
    assert len(called) == (k == 3 and size == 40)


@pytest.mark.parametrize(
    ("channels", "out", "size"),
    [pytest.param(128, 64, (24, 26), id="small"), pytest.param(128, 3, (40, 40), id="many channels")],
)
def test_training_convolutions_keep_the_error_budget(channels, out, size):
    """oneDNN's channels-last convolution, which the input asks for, errs 2.7 times as much as its NCHW one."""
    torch.manual_seed(0)
    stock = torch.nn.Conv2d(channels, out, 3, padding=1)
    ours = Conv2d(channels, out, 3, padding=1)
    ours.load_state_dict(stock.state_dict())
    x, grad = torch.randn(1, channels, *size), torch.randn(1, out, *size)
    double = copy.deepcopy(stock).double()
    assert_within_budget(
        forward_backward(lambda x: ours(x.contiguous(memory_format=torch.channels_last)), ours, x, grad),
        forward_backward(stock, stock, x, grad),
        forward_backward(double, double, x.double(), grad.double()),
    )


@COMPILED
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("form", ["features", "label map"])
def test_a_layer_at_every_pixel_keeps_the_error_budget(form, training, monkeypatch):
    """Large enough for this operator in both of its convolutions."""
    called = []
    monkeypatch.setattr(ops, "conv3x3", lambda *args: called.append(args) or torch.ops.spade_kernels.conv3x3(*args))
    layer = random_spade("spadebatch3x3", 24, 20).train(training)
    x, label_map = torch.randn(1, 24, 40, 40), random_label_map("noise", (1, 40, 40), 20)
    planes = label_map.one_hot() if form == "label map" else torch.randn(1, 20, 40, 40)
    segmap = label_map if form == "label map" else planes
    with functional.use_path("dense"):
        got = forward_backward(lambda x: layer(x, segmap), layer, x, x)
    assert len(called) == (2 if form == "features" else 1)

    def expected(dtype: torch.dtype) -> dict[str, Tensor]:
        twin, condition, inputs = copy.deepcopy(layer).to(dtype), planes.to(dtype), x.to(dtype)
        return forward_backward(lambda x: stock_spade(twin, x, condition), twin, inputs, inputs)

    assert_within_budget(got, expected(torch.float32), expected(torch.float64))


def frozen_pair(config: str = "spadebatch3x3", k: int = 3) -> tuple[SPADE, Conv2d]:
    torch.manual_seed(0)
    norm, conv = SPADE(config, 16, 5), Conv2d(16, 32, k, padding=k // 2)
    for module in (norm, conv):
        sk.freeze(module)
    return norm, conv


@COMPILED
@pytest.mark.parametrize("k", KERNELS)
@torch.no_grad()
def test_a_frozen_convolution_follows_the_backend(k):
    norm, conv = frozen_pair(k=k)
    x, segmap = torch.randn(2, 16, 8, 8), random_label_map("blobs", (2, 32, 32), 5)
    expected = conv(norm(x, segmap, 0.2, upsample=2))
    try:
        for name in ("cpu", "reference", "auto"):
            sk.use_backend(name)
            assert relative_error(spade_conv(conv, norm, x, segmap, 0.2, upsample=2), expected) < 1e-6
    finally:
        sk.use_backend("auto")


@pytest.mark.usefixtures("backend")
@torch.no_grad()
def test_hooks_of_a_frozen_norm_are_called():
    norm, conv = frozen_pair()
    x, segmap = torch.randn(2, 16, 16, 16), random_label_map("blobs", (2, 32, 32), 5)
    seen: list[Tensor] = []
    expected = spade_conv(conv, norm, x, segmap)
    handle = norm.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert relative_error(spade_conv(conv, norm, x, segmap), expected) < 1e-6
    handle.remove()
    spade_conv(conv, norm, x, segmap)
    assert len(seen) == 1
    assert seen[0].shape == x.shape


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("k", KERNELS)
def test_a_convolution_of_what_is_not_made_yet_has_gradients(k):
    """Outside inference it is made first."""
    torch.manual_seed(0)
    norm, conv = SPADE("spadeinstance3x3", 16, 5).double(), Conv2d(16, 32, k, padding=k // 2).double()
    x, segmap = torch.randn(2, 16, 9, 9, dtype=torch.float64), random_label_map("blobs", (2, 32, 32), 5)
    gradients = []
    for run in (lambda x: conv(norm.defer(x, segmap, 0.2)), lambda x: conv(norm(x, segmap, 0.2))):
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)
