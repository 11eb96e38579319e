"""Streams, synchronisation, determinism, precision, bad input and size on the device."""

from __future__ import annotations

import pytest
import torch
from gpu_masks import CLASSES, SIZE, indexed_mask
from torch import Tensor

import spade_kernels as sk
from spade_kernels import ops
from spade_kernels.functional import use_path
from spade_kernels.testing import (
    assert_within_budget,
    forward_backward,
    random_label_map,
    random_spade,
    relative_error,
    stock_spade,
)


def gradients_of(generator, mask) -> dict[str, Tensor]:
    generator.zero_grad()
    generator(mask).square().mean().backward()
    return {name: p.grad for name, p in generator.named_parameters()}


def test_no_synchronisation_once_the_index_is_there(generator):
    mask = indexed_mask("blobs", generator)
    gradients_of(generator, mask)
    torch.cuda.set_sync_debug_mode("error")
    try:
        gradients_of(generator, mask)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_one_synchronisation_for_the_index(generator, monkeypatch):
    """That of its row counts, which the kernel itself asks for: PyTorch's own functions ask for nothing."""
    if sk.build_info()["kernels"]["window_index"] != "cuda":
        pytest.skip("the CUDA kernels are not built")
    mask = random_label_map("blobs", (2, SIZE, SIZE), CLASSES)
    calls = []
    window_index = ops.window_index
    monkeypatch.setattr(
        ops, "window_index", lambda *arguments, **how: calls.append(1) or window_index(*arguments, **how)
    )
    torch.cuda.set_sync_debug_mode("error")
    try:
        mask.prepare(generator.resolutions())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert calls == [1]


def test_on_another_stream():
    layer = random_spade("spadebatch3x3", 64, CLASSES).eval()
    x, mask = torch.randn(2, 64, SIZE, SIZE), random_label_map("blobs", (2, SIZE, SIZE), CLASSES)
    expected = forward_backward(lambda x: layer(x, mask), layer, x, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        # Work that the result must not overtake: on the wrong stream the layer would read x before it is there.
        late = torch.empty_like(x)
        torch.cuda._sleep(50_000_000)
        late.copy_(x)
        again = sk.LabelMap(mask.labels, CLASSES)
        got = forward_backward(lambda x: layer(x, again), layer, late, late)
    torch.cuda.current_stream().wait_stream(side)
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="not run: there is one GPU")
def test_on_another_device():
    layer = random_spade("spadebatch3x3", 64, CLASSES).eval()
    x, mask = torch.randn(2, 64, SIZE, SIZE), random_label_map("blobs", (2, SIZE, SIZE), CLASSES)
    expected = layer(x, mask)
    got = layer.to("cuda:1")(x.to("cuda:1"), mask.to("cuda:1"))
    assert got.device.index == 1
    assert torch.equal(got.to("cuda:0"), expected)


@pytest.mark.parametrize(("config", "kind", "upsample"), [("instance", "blobs", 1), ("batch", "constant", 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_a_hundred_times_under_load(dtype, config, kind, upsample):
    layer = random_spade(f"spade{config}3x3", 64, CLASSES + 1).eval()
    x, grad = torch.randn(2, 64, SIZE, SIZE), torch.randn(2, 64, SIZE * upsample, SIZE * upsample)
    first: dict[str, Tensor] = {}
    for repeat in range(100):
        put_load()
        mask = random_label_map(kind, (2, SIZE * upsample, SIZE * upsample), CLASSES, edges=True)
        with use_path("windows"):
            got = forward_backward(
                lambda x, mask=mask: layer(x, mask, 0.2, upsample=upsample), layer, x.to(dtype), grad
            )
        for name, value in got.items():
            assert torch.equal(value, first.setdefault(name, value)), f"{name}, repeat {repeat}"


def test_same_gradients_of_the_generator_under_load(generator):
    generator.eval()
    first: dict[str, Tensor] = {}
    for repeat in range(20):
        put_load()
        for name, value in gradients_of(generator, indexed_mask("blobs", generator)).items():
            assert torch.equal(value, first.setdefault(name, value)), f"{name}, repeat {repeat}"


def put_load() -> None:
    """Keeps the device busy for some milliseconds, on a stream of its own."""
    with torch.cuda.stream(torch.cuda.Stream()):
        load = torch.randn(2048, 2048)
        for _ in range(20):
            load = load @ load / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels", [64, 256])
@pytest.mark.parametrize("norm", ["instance", "batch"])
def test_error_budget(norm, channels, dtype):
    """Against the stock layer in the same precision, at sizes that fill the device."""
    mask = random_label_map("blobs", (2, 128, 128), CLASSES, edges=True)
    layer = random_spade(f"spade{norm}3x3", channels, CLASSES + 1).to(dtype)
    x, grad = torch.randn(2, 2, channels, 128, 128, dtype=dtype)
    planes = mask.one_hot(dtype)
    exact_layer = random_spade(f"spade{norm}3x3", channels, CLASSES + 1).to(dtype).double()
    exact_layer.load_state_dict(layer.state_dict())
    exact = forward_backward(lambda x: stock_spade(exact_layer, x, planes.double()), exact_layer, x.double(), grad)
    stock = forward_backward(lambda x: stock_spade(layer, x, planes), layer, x, grad)
    for path in ("windows", "dense"):
        with use_path(path):
            got = forward_backward(lambda x: layer(x, mask), layer, x, grad)
        assert_within_budget(got, stock, exact)


def test_tf32():
    """Where PyTorch's settings ask for it, products are rounded to ten bits, in the table as in its gradients."""
    mask, layer = random_label_map("blobs", (2, 128, 128), CLASSES), random_spade("spadebatch3x3", 64, CLASSES)
    x, grad = torch.randn(2, 2, 64, 128, 128)
    settings = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    results = {}
    for precision in ("ieee", "tf32"):
        before = [setting.fp32_precision for setting in settings]
        for setting in settings:
            setting.fp32_precision = precision
        with use_path("windows"):
            results[precision] = forward_backward(lambda x: layer(x, mask), layer, x, grad)
        for setting, value in zip(settings, before, strict=True):
            setting.fp32_precision = value
    errors = {name: relative_error(value, results["ieee"][name]) for name, value in results["tf32"].items()}
    assert max(errors.values()) < 2**-8, errors
    assert max(errors.values()) > 2**-16, "nothing was rounded"


@pytest.mark.parametrize("form", ["label map", "dense"])
def test_compiled_whole(form):
    layer = random_spade("spadebatch3x3", 32, CLASSES)
    x, mask = torch.randn(2, 32, SIZE, SIZE), random_label_map("blobs", (2, SIZE, SIZE), CLASSES)
    segmap = mask if form == "label map" else mask.one_hot() + 0.5
    expected = layer.eval()(x, segmap)
    assert relative_error(torch.compile(layer, fullgraph=True)(x, segmap), expected) < 1e-3


def test_compiled_generator_in_training(generator):
    generator.eval()
    mask = indexed_mask("blobs", generator)
    expected = {name: value.clone() for name, value in gradients_of(generator, mask).items()}
    compiled = torch.compile(generator, fullgraph=True)
    generator.zero_grad()
    compiled(mask).square().mean().backward()
    largest = max(value.abs().max() for value in expected.values())
    for name, parameter in generator.named_parameters():
        assert (parameter.grad - expected[name]).abs().max() < 1e-3 * largest, name


def test_a_bad_label_is_an_exception_and_no_more():
    labels = torch.randint(CLASSES, (1, SIZE, SIZE))
    labels[0, 5, 7] = CLASSES + 3
    with pytest.raises(ValueError, match=rf"label {CLASSES + 3} at image 0, pixel \(x=7, y=5\)"):
        sk.LabelMap(labels, CLASSES)
    assert torch.ones(3).sum().item() == 3


def test_more_than_2_to_the_31_elements():
    n, c, size = 33, 64, 1024
    x = torch.empty(n, c, size, size, dtype=torch.bfloat16, memory_format=torch.channels_last).normal_()
    mean, m2 = ops.channel_stats(x)
    last = x[-1].double()
    assert relative_error(mean[-1], last.mean((1, 2))) < 1e-3
    assert relative_error(m2[-1], (last - last.mean((1, 2), keepdim=True)).square().sum((1, 2))) < 1e-4
    table, pixel_row = torch.randn(3, 2 * c), torch.randint(3, (n, size, size))
    y = ops.modulate(x, mean, torch.ones_like(mean), table, pixel_row)
    scale, shift = table[pixel_row[-1]].double().chunk(2, -1)
    expected = (last - mean[-1, :, None, None]) * scale.permute(2, 0, 1) + shift.permute(2, 0, 1)
    assert relative_error(y[-1], expected) < 2**-7
