"""The SPADE layer against the stock layer written with torch.nn.functional."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from spade_kernels import SPADE, LabelMap, SyncBatchNorm2d, functional
from spade_kernels.normalization import moments
from spade_kernels.testing import (
    assert_within_budget,
    forward_backward,
    random_label_map,
    random_labels,
    random_spade,
    relative_error,
    stock_spade,
)

pytestmark = pytest.mark.usefixtures("backend")

NORMS = [("instance", True), ("batch", True), ("batch", False), ("syncbatch", True), ("syncbatch", False)]
CONDITIONS = [{}, {"edges": True}, {"ignore": True}, {"edges": True, "ignore": True}]
SIZES = [(13, 10), (5, 7), (9, 24)]
CLASSES, CHANNELS = 5, 4


def segmaps(label_map: LabelMap, dtype: torch.dtype) -> list[LabelMap | Tensor]:
    """One condition in every form that a layer takes."""
    forms = [label_map, label_map.one_hot(dtype)]
    if label_map.edges is None and label_map.ignore_index is None:
        forms += [label_map.labels, label_map.labels.to(torch.uint8).unsqueeze(1)]
    return forms


def check_layer(
    layer: SPADE, x: Tensor, label_map: LabelMap, dtype: torch.dtype, negative_slope: float = 1.0, **how
) -> None:
    """Every form of the condition, and a dense one, keeps the error budget, for the output and every gradient."""
    planes = label_map.one_hot(torch.float64)
    check_condition(layer, x, planes, segmaps(label_map, dtype), dtype, negative_slope, **how)
    with functional.use_path("dense"):
        check_condition(layer, x, planes, [label_map], dtype, negative_slope, **how)
    dense = (planes + torch.rand_like(planes)).to(dtype)
    check_condition(layer, x, dense.double(), [dense], dtype, negative_slope, **how)


def check_condition(
    layer: SPADE,
    x: Tensor,
    planes: Tensor,
    forms: Sequence[LabelMap | Tensor],
    dtype: torch.dtype,
    negative_slope: float,
    upsample: int = 1,
) -> None:
    layer, x = copy.deepcopy(layer).to(dtype), x.to(dtype)
    grad = torch.randn(*x.shape[:2], x.shape[2] * upsample, x.shape[3] * upsample, dtype=dtype)

    def stock(layer: SPADE, planes: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: stock_spade(layer, F.interpolate(x, scale_factor=upsample), planes, negative_slope)

    exact_layer = copy.deepcopy(layer).double()
    exact = forward_backward(stock(exact_layer, planes), exact_layer, x.double(), grad)
    expected = forward_backward(stock(layer, planes.to(dtype)), layer, x, grad)
    for segmap in forms:
        got = forward_backward(
            lambda x, segmap=segmap: layer(x, segmap, negative_slope, upsample=upsample), layer, x, grad
        )
        assert all(value.dtype == dtype for value in got.values())
        assert got["y"].is_contiguous(memory_format=torch.channels_last)
        assert_within_budget(got, expected, exact)


@pytest.mark.parametrize("kernel_size", [1, 3, 5])
@pytest.mark.parametrize(("norm", "training"), NORMS)
def test_every_setting_in_float64(norm, training, kernel_size):
    for condition in CONDITIONS:
        label_map = random_label_map("blobs", (2, 13, 10), CLASSES, **condition)
        layer = random_spade(f"spade{norm}{kernel_size}x{kernel_size}", CHANNELS, label_map.channels).train(training)
        for size in SIZES:
            check_layer(layer, torch.randn(2, CHANNELS, *size) + 0.5, label_map, torch.float64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["blobs", "noise", "stripes", "constant", "islands"])
@pytest.mark.parametrize(("norm", "training"), NORMS[:3])
def test_error_budget(norm, training, kind, dtype):
    label_map = random_label_map(kind, (2, 32, 32), CLASSES, edges=True)
    layer = random_spade(f"spade{norm}3x3", 32, label_map.channels).train(training)
    check_layer(layer, torch.randn(2, 32, 40, 32) + 0.5, label_map, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_leaky_relu_is_folded(dtype):
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES)
    check_layer(layer, torch.randn(2, CHANNELS, 9, 9), random_label_map("blobs", (2, 12, 12), CLASSES), dtype, 0.2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("norm", "training"), NORMS[:3])
def test_upsampling_is_folded(norm, training, dtype):
    layer = random_spade(f"spade{norm}3x3", 32, CLASSES).train(training)
    x = torch.randn(2, 32, 9, 7) + 0.5
    # In low precision rounding decides the sign of y near zero, in the stock layer too: few pixels make all the error.
    negative_slope = 0.2 if dtype == torch.float64 else 1.0
    check_layer(layer, x, random_label_map("blobs", (2, 12, 12), CLASSES), dtype, negative_slope, upsample=2)


def test_upsampled_running_statistics():
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).double()
    expected, label_map = copy.deepcopy(layer), random_label_map("blobs", (2, 12, 12), CLASSES)
    x = torch.randn(2, CHANNELS, 3, 5, dtype=torch.float64)
    layer(x, label_map, upsample=2)
    expected(F.interpolate(x, scale_factor=2), label_map)
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value, rtol=1e-13, atol=1e-13, msg=name)


@pytest.mark.parametrize("path", ["windows", "dense"])
def test_gain_is_folded(path):
    layer, label_map = (
        random_spade("spadebatch3x3", CHANNELS, CLASSES).double(),
        random_label_map("blobs", (2, 9, 9), 5),
    )
    x, grad = torch.randn(2, CHANNELS, 9, 9).double(), torch.randn(2, CHANNELS, 9, 9).double()
    gains = [torch.tensor(0.3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    with functional.use_path(path):
        got = forward_backward(lambda x: layer(x, label_map, 0.2, gain=gains[0]), layer, x, grad)
        expected = forward_backward(lambda x: layer(x, label_map, 0.2) * gains[1], layer, x, grad)
    got["gradient of gain"], expected["gradient of gain"] = (gain.grad for gain in gains)
    assert_within_budget(got, expected, expected)


def test_shared_moments():
    layer, label_map = random_spade("spadeinstance3x3", CHANNELS, CLASSES), random_label_map("blobs", (2, 9, 9), 5)
    x = torch.randn(2, CHANNELS, 9, 9).contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(
        layer(x, label_map, moments=moments(layer.param_free_norm, x)), layer(x, label_map), rtol=0, atol=0
    )


@pytest.mark.parametrize("layout", ["channels_last", "every second column", "expanded"])
def test_any_strides(layout):
    x = torch.randn(2, CHANNELS, 6, 8)
    label_map = random_label_map("blobs", (2, 12, 12), CLASSES)
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).double()
    strided = {
        "channels_last": lambda: x.contiguous(memory_format=torch.channels_last),
        "every second column": lambda: x.repeat_interleave(2, 3)[..., ::2],
        "expanded": lambda: x[:1].expand_as(x),
    }[layout]()
    expected = stock_spade(layer, strided.double().contiguous(), label_map.one_hot(torch.float64))
    for segmap in segmaps(label_map, torch.float64):
        assert relative_error(layer(strided.double(), segmap), expected) < 1e-12


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("norm", ["batch", "syncbatch"])
def test_running_statistics_equal_batch_norm(norm, dtype, momentum):
    layer = random_spade(f"spade{norm}3x3", CHANNELS, CLASSES).to(dtype)
    expected = nn.BatchNorm2d(CHANNELS, affine=False, momentum=momentum).to(dtype)
    expected.load_state_dict(layer.param_free_norm.state_dict())
    layer.param_free_norm.momentum = momentum
    label_map = random_label_map("blobs", (3, 8, 8), CLASSES)
    for _ in range(3):
        x = 3 * torch.randn(3, CHANNELS, 8, 8, dtype=dtype) + 2
        layer(x, label_map)
        expected(x)
    for name, value in expected.state_dict().items():
        limit = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(layer.state_dict()[f"param_free_norm.{name}"], value, rtol=limit, atol=limit)


def test_eval_leaves_running_statistics_alone():
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).eval()
    before = copy.deepcopy(layer.state_dict())
    layer(torch.randn(2, CHANNELS, 8, 8), random_label_map("blobs", (2, 8, 8), CLASSES))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("norm", ["instance", "batch", "syncbatch"])
def test_state_dict_keys_are_the_originals(norm):
    parts = ("mlp_shared.0", "mlp_gamma", "mlp_beta")
    expected = {f"{part}.{name}" for part in parts for name in ("weight", "bias")}
    if norm != "instance":
        expected |= {f"param_free_norm.{n}" for n in ("running_mean", "running_var", "num_batches_tracked")}
    assert set(SPADE(f"spade{norm}3x3", 6, 9).state_dict()) == expected


@pytest.mark.parametrize(
    ("config", "norm", "kernel_size"),
    [
        ("spectralspadesyncbatch3x3", SyncBatchNorm2d, 3),
        ("spadebatch3x5", nn.BatchNorm2d, 3),
        ("spadeinstance1x1", nn.InstanceNorm2d, 1),
        ("spadeinstance5x5", nn.InstanceNorm2d, 5),
    ],
)
def test_config_text(config, norm, kernel_size):
    layer = SPADE(config, 6, 9)
    assert type(layer.param_free_norm) is norm
    convolutions = (layer.mlp_shared[0], layer.mlp_gamma, layer.mlp_beta)
    assert [c.kernel_size[0] for c in convolutions] == [kernel_size] * 3
    assert [(c.in_channels, c.out_channels) for c in convolutions] == [(9, 128), (128, 6), (128, 6)]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("spadeinstance11x11", "does not hold spade<norm>"),
        ("spade3x3", "does not hold spade<norm>"),
        ("batch3x3", "does not hold spade<norm>"),
        ("spadegroup3x3", "'group' is not a SPADE norm"),
        ("spadebatch4x4", "must be odd, got 4"),
    ],
)
def test_bad_config_text(config, message):
    with pytest.raises(ValueError, match=message):
        SPADE(config, 6, 9)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("norm", "training"), NORMS[:3])
def test_not_finite_stays_where_the_stock_layer_puts_it(norm, training, value):
    label_map = random_label_map("blobs", (2, 8, 8), CLASSES)
    layer = random_spade(f"spade{norm}3x3", CHANNELS, CLASSES).train(training)
    x = torch.randn(2, CHANNELS, 8, 8)
    x[1, 2, 3, 4] = value
    expected = stock_spade(layer, x, label_map.one_hot())
    for segmap in segmaps(label_map, torch.float32):
        torch.testing.assert_close(layer(x, segmap).isfinite(), expected.isfinite())
        torch.testing.assert_close(layer(x, segmap).isnan(), expected.isnan())


@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_large_mean(norm):
    """Ten thousand standard deviations off zero, where E[x^2] - E[x]^2 in float32 has no correct digit."""
    label_map = random_label_map("blobs", (2, 32, 32), CLASSES)
    layer = random_spade(f"spade{norm}3x3", CHANNELS, CLASSES)
    x = torch.randn(2, CHANNELS, 32, 32) + 1e4
    expected = stock_spade(copy.deepcopy(layer).double(), x.double(), label_map.one_hot(torch.float64))
    for segmap in segmaps(label_map, torch.float32):
        assert relative_error(layer(x, segmap), expected) < 1e-3


@pytest.mark.parametrize(("norm", "batch"), [("instance", 2), ("batch", 1), ("syncbatch", 1)])
def test_one_value_per_channel_has_no_variance(norm, batch):
    layer = random_spade(f"spade{norm}3x3", CHANNELS, CLASSES)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="more than one"):
        layer(torch.randn(batch, CHANNELS, 1, 1), random_label_map("blobs", (batch, 8, 8), CLASSES))
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_wrong_weights_and_options_change_no_statistics():
    x, label_map = torch.randn(2, CHANNELS, 8, 8), random_label_map("blobs", (2, 8, 8), CLASSES)
    for change, options, message in (
        ({}, {"upsample": 3}, "upsample must be 1 or 2"),
        ({"mlp_gamma": nn.Conv2d(128, CHANNELS + 1, 1)}, {}, "mlp_gamma gives"),
        ({"mlp_gamma": nn.Conv2d(128, CHANNELS, 1)}, {"upsample": 0}, "upsample must be 1 or 2"),
        ({}, {"gain": -1.0}, "gain must be a positive number"),
    ):
        layer = random_spade("spadebatch3x3", CHANNELS, CLASSES)
        before = copy.deepcopy(layer.param_free_norm.state_dict())
        for name, module in change.items():
            setattr(layer, name, module)
        with pytest.raises(ValueError, match=message):
            layer(x, label_map, **options)
        assert all(torch.equal(value, before[name]) for name, value in layer.param_free_norm.state_dict().items())


def test_without_running_statistics_those_of_the_batch_are_taken():
    """PyTorch's batch norm behaves like this, in evaluation too."""
    layer, x = random_spade("spadebatch3x3", CHANNELS, CLASSES), torch.randn(2, CHANNELS, 8, 8)
    label_map = random_label_map("blobs", (2, 8, 8), CLASSES)
    trained = layer(x, label_map)
    layer.param_free_norm.running_mean = layer.param_free_norm.running_var = None
    assert torch.equal(layer.eval()(x, label_map), trained)
    assert torch.equal(layer.train()(x, label_map), trained)


def test_wrong_input_changes_no_statistics():
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES)
    before = copy.deepcopy(layer.state_dict())
    label_map = random_label_map("blobs", (2, 8, 8), CLASSES)
    for x, segmap in [
        (torch.randn(2, CHANNELS + 1, 8, 8), label_map),
        (torch.randn(CHANNELS, 8, 8), label_map),
        (torch.randn(3, CHANNELS, 8, 8), label_map),
        (torch.randn(2, CHANNELS, 8, 8), label_map.labels + CLASSES),
    ]:
        with pytest.raises(ValueError, match=r"x has|x must|segmap holds|outside 0"):
            layer(x, segmap)
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """In training a convolution hands the layer a low-precision x, and the weights are float32."""
    label_map = random_label_map("blobs", (2, 16, 16), CLASSES)
    # Without a bias: batch norm removes it, so its gradient is zero but for rounding, and has no relative error.
    layer, conv = random_spade("spadebatch3x3", CHANNELS, CLASSES), nn.Conv2d(3, CHANNELS, 3, padding=1, bias=False)
    x, grad = torch.randn(2, 3, 16, 16), torch.randn(2, CHANNELS, 16, 16)
    both = nn.ModuleList([layer, conv])

    def run(spade) -> dict[str, Tensor]:
        def in_autocast(x: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype):
                y = conv(x)
                assert y.dtype == dtype
                return spade(y)

        return forward_backward(in_autocast, both, x, grad)

    planes = label_map.one_hot()
    stock = run(lambda y: stock_spade(layer, y, planes))
    exact_both = copy.deepcopy(both).double()
    exact_layer, exact_conv = exact_both
    exact = forward_backward(
        lambda x: stock_spade(exact_layer, exact_conv(x), planes.double()), exact_both, x.double(), grad
    )
    for segmap in segmaps(label_map, torch.float32):
        got = run(lambda y, segmap=segmap: layer(y, segmap))
        assert got["y"].dtype == dtype
        assert got["gradient of 0.mlp_gamma.weight"].dtype == torch.float32
        assert_within_budget(got, stock, exact)


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
    ],
)
def test_x_and_weights_of_different_dtypes(x_dtype, weight_dtype):
    """No worse than the stock layer with all in the coarser of the two, which is what stock PyTorch would ask for."""
    label_map = random_label_map("blobs", (2, 12, 12), CLASSES)
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).to(weight_dtype)
    x = torch.randn(2, CHANNELS, 12, 12).to(x_dtype)
    exact_layer = copy.deepcopy(layer).double()
    exact = forward_backward(
        lambda x: stock_spade(exact_layer, x, label_map.one_hot(torch.float64)), exact_layer, x.double(), x
    )
    coarser = max(x_dtype, weight_dtype, key=lambda dtype: torch.finfo(dtype).eps)
    coarse_layer = copy.deepcopy(layer).to(coarser)
    stock = forward_backward(
        lambda x: stock_spade(coarse_layer, x, label_map.one_hot(coarser)), coarse_layer, x.to(coarser), x
    )
    for segmap in segmaps(label_map, torch.float32):
        got = forward_backward(lambda x, segmap=segmap: layer(x, segmap), layer, x, x)
        for name, value in got.items():
            assert value.dtype == (x_dtype if name in ("y", "gradient of x") else weight_dtype), name
        assert_within_budget(got, stock, exact)


class _LargestFloat(TorchDispatchMode):
    """Remembers the most elements any float result had."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.elements = max(self.elements, value.numel())
        return result


def test_no_one_hot_tensor_is_built_from_a_label_map():
    classes, size = 400, (64, 64)
    labels = random_labels("blobs", (1, *size), 8)
    layer = random_spade("spadebatch3x3", CHANNELS, classes)
    x, one_hot_elements = torch.randn(1, CHANNELS, *size), classes * size[0] * size[1]
    label_map = LabelMap(labels, classes)
    for segmap, is_smaller in [(label_map, True), (label_map.one_hot()[:, :, ::2, ::2] + 0.5, False)]:
        with _LargestFloat() as largest:
            forward_backward(lambda x, segmap=segmap: layer(x, segmap), layer, x, x)
        assert (largest.elements < one_hot_elements) is is_smaller


def test_meta_device():
    """Planes go through without their values, so that shapes and memory can be planned; then weights are loaded."""
    made = SPADE("spadesyncbatch3x3", CHANNELS, CLASSES)
    with torch.device("meta"):
        layer = SPADE("spadesyncbatch3x3", CHANNELS, CLASSES)
        y = layer(torch.empty(2, CHANNELS, 4, 5), torch.empty(2, CLASSES, 8, 10), upsample=2)
    assert y.is_meta
    assert y.shape == (2, CHANNELS, 8, 10)
    y.sum().backward()
    device = torch.get_default_device()
    layer.to_empty(device=device).load_state_dict(made.state_dict())
    x, label_map = torch.randn(2, CHANNELS, 9, 9), random_label_map("blobs", (2, 9, 9), CLASSES)
    assert torch.equal(layer(x, label_map), made(x, label_map))
