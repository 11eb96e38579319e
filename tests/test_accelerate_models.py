"""`accelerate` on models: replaced and refused layers, strict mode, copies, files, compilation and the report."""

from __future__ import annotations

import copy
import io
import pickle
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from stand_ins import (
    CHANNELS,
    CLASSES,
    HIDDEN,
    Block,
    Clade,
    Diffusion,
    Imaginaire,
    Original,
    X,
    conv,
    instance,
    plain,
    planes,
    results,
    wrapped,
)
from torch import Tensor, nn
from torch.nn.utils import spectral_norm

import spade_kernels as sk
from benchmarks import accelerate as bench
from spade_kernels.accelerate.layer import AcceleratedLayer
from spade_kernels.testing import random_label_map, relative_error
from spade_model.benchmark.results import Result

pytestmark = pytest.mark.usefixtures("kernels_for_any_work")


class Bilinear(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, F.interpolate(segmap, x.shape[2:], mode="bilinear"))


class Absolute(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap).abs()


class Root(Original):
    """A layer whose results and gradients are NaN."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return (super().forward(x, segmap) - 100).sqrt()


def meta() -> nn.Module:
    return Original(instance()).to("meta")


def lazy() -> nn.Module:
    layer = Original(instance())
    layer.mlp_gamma = nn.LazyConv2d(CHANNELS, 3, padding=1)
    return layer


def hooked() -> nn.Module:
    layer = Original(instance())
    layer.mlp_gamma.register_forward_hook(lambda module, args, y: y)
    return layer


def with_gelu() -> nn.Module:
    layer = Original(instance())
    layer.mlp_shared[1] = nn.GELU()
    return layer


def with_two_hooks() -> nn.Module:
    layer = wrapped(Original(instance()), spectral_norm)
    layer.mlp_gamma.register_forward_pre_hook(lambda module, args: None)
    return layer


def with_attributes(*names: str) -> nn.Module:
    layer = nn.Module()
    for name in names:
        layer.add_module(name, nn.Linear(2, 2))
    return layer


def traced() -> nn.Module:
    return torch.jit.trace(Original(instance()), (torch.randn(X), planes()))


def imaginaire_with_weights_from_outside() -> nn.Module:
    layer = Imaginaire()
    layer.is_hyper = True
    return layer


def with_even_kernels() -> nn.Module:
    layer = Original(instance())
    layer.mlp_gamma = nn.Conv2d(HIDDEN, CHANNELS, 2)
    return layer


def padded_in_two_ways() -> nn.Module:
    layer = Original(instance(), padding_mode="reflect")
    layer.mlp_beta.padding_mode = "zeros"
    return layer


def of_three_dimensions() -> nn.Module:
    layer = Original(nn.InstanceNorm3d(CHANNELS))
    layer.mlp_shared = nn.Sequential(nn.Conv3d(CLASSES, HIDDEN, 3, padding=1), nn.ReLU())
    layer.mlp_gamma, layer.mlp_beta = (nn.Conv3d(HIDDEN, CHANNELS, 3, padding=1) for _ in range(2))
    return layer


def without_beta() -> nn.Module:
    layer = Original(instance())
    layer.mlp_beta = nn.Identity()
    return layer


def with_another_hidden_width() -> nn.Module:
    layer = Original(instance())
    layer.mlp_gamma = conv(HIDDEN + 1, CHANNELS)
    return layer


def quantized() -> nn.Module:
    layer = Original(instance())
    layer.register_parameter("table", nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False))
    return layer


class WithScale(Original):
    """A subclass with a formula of its own."""

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return 2 * super().forward(x, segmap)


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another formula": (lambda: Absolute(instance()), "results differ by"),
    "NaN": (lambda: Root(instance()), "results differ by inf"),
    "a subclass": (lambda: WithScale(instance()), "results differ by"),
    "another resize": (lambda: Bilinear(instance()), "results differ by"),
    "meta": (meta, "meta device"),
    "lazy": (lazy, "mlp_gamma|not initialized"),
    "traced": (traced, "scripted"),
    "hooked": (hooked, "mlp_gamma has hooks"),
    "two hooks": (with_two_hooks, "mlp_gamma has hooks"),
    "GELU": (with_gelu, "activation GELU"),
    "grouped": (lambda: Original(instance(), classes=4, groups=2), "of another kind"),
    "circular": (lambda: Original(instance(), padding_mode="circular"), "of another kind"),
    "dilated": (lambda: Original(instance(), dilation=2), "of another kind"),
    "even kernels": (with_even_kernels, "of another kind"),
    "two paddings": (padded_in_two_ways, "pad differently"),
    "three dimensions": (of_three_dimensions, "not one 2-d convolution|an activation"),
    "no beta": (without_beta, "mlp_beta is not one 2-d convolution"),
    "another hidden width": (with_another_hidden_width, "channels that the hidden layer has"),
    "quantized": (quantized, "quantized"),
    "CLADE with distances": (lambda: Clade(instance(), distances=True), "depend on distances"),
    "imaginaire, predicted weights": (imaginaire_with_weights_from_outside, "predicts the weights"),
    "INADE": (lambda: with_attributes("fc_noise", "param_free_norm"), "noise of each instance"),
    "SAFM": (lambda: with_attributes("pre_seg", "pre_dis", "mlp_gamma"), "predicts the weights"),
    "InceptionSPADE": (lambda: with_attributes("res_ops", "dw_ops"), "branches with batch norms"),
    "AAD": (lambda: with_attributes("conv1", "conv2", "fc_1", "fc_2", "conv_h"), "by a mask that depends on x"),
    "SEAN": (lambda: with_attributes("Spade", "blending_gamma"), "style codes"),
    "CoCosNet, two paths": (lambda: with_attributes("mlp_gamma_example", "mlp_gamma_imagine"), "similarity map"),
}


@pytest.mark.parametrize("name", LEFT)
def test_unsupported_layers_are_left_alone(name):
    build, reason = LEFT[name]
    model = build()
    before = [type(m) for m in model.modules()]
    report = sk.accelerate(model)
    assert not report.replaced
    assert [type(m) for m in model.modules()] == before
    ((_, _, said),) = report.left
    assert re.search(reason, said), said
    assert said in str(report)
    with pytest.raises(ValueError, match="cannot be accelerated"):
        sk.accelerate(model, strict=True)


def test_strict_replaces_all_or_nothing():
    model = nn.Sequential(Original(instance()), hooked())
    with pytest.raises(ValueError, match=r"1 layers cannot be accelerated; 1 \(Original\): .* has hooks"):
        sk.accelerate(model, strict=True)
    assert not any(isinstance(m, AcceleratedLayer) for m in model.modules())


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(), sk.SPADE("spadebatch3x3", 4, 3)], ids=lambda model: type(model).__name__
)
def test_models_without_layers_to_replace(model):
    assert str(sk.accelerate(model)) == "accelerate: there is no SPADE layer in this model"
    assert str(sk.accelerate(model, strict=True)).startswith("accelerate: there is no")


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no grad", "inference", "autocast", "default device"],
)
def test_the_modes_of_the_caller_do_not_matter(mode):
    layer = Block(8, 4)
    before = torch.get_rng_state()
    with mode():
        assert len(sk.accelerate(layer, strict=True).replaced) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_only_modules_are_taken():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got str"):
        sk.accelerate("model")


def test_a_shared_layer_is_replaced_once():
    layer = Original(instance())
    model = nn.ModuleList([layer, layer])
    assert len(sk.accelerate(model).replaced) == 1
    assert not sk.accelerate(model).replaced
    assert model[0] is model[1]


def test_the_report_is_a_table():
    report = sk.accelerate(nn.ModuleDict({"a": Original(instance()), "b": hooked()}), measure=True)
    first, second, third = str(report).splitlines()
    assert first.split() == ["layer", "class", "family", "error", "speed-up"]
    assert second.split()[:3] == ["a", "Original", "SPADE"]
    assert second.endswith("x")
    assert third.startswith("left alone: b (Original): SPADE: mlp_gamma has hooks")


def test_restore_and_state_dict():
    stock = nn.Sequential(nn.Conv2d(3, CHANNELS, 1), Block(8, 4))
    model = copy.deepcopy(stock)
    parameters, keys = list(model.parameters()), list(model.state_dict())
    sk.accelerate(model)
    assert list(model.state_dict()) == keys
    assert all(one is other for one, other in zip(model.parameters(), parameters, strict=True))
    model.load_state_dict(stock.state_dict())
    assert type(copy.deepcopy(model)[1].norm_0) is type(model[1].norm_0)
    assert sk.restore(model) is model
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    assert [sorted(m.__dict__) for m in model.modules()] == [sorted(m.__dict__) for m in stock.modules()]


def test_a_pickled_model_is_loaded_as_it_was():
    model = Block(8, 4)
    sk.accelerate(model)
    loaded = pickle.loads(pickle.dumps(model))
    assert type(loaded) is Block
    assert type(loaded.norm_0) is Original
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    loaded.load_state_dict(torch.load(buffer, weights_only=True))


def test_copies_train_apart():
    layer = Original(instance()).double()
    sk.accelerate(layer)
    average = copy.deepcopy(layer)
    with torch.no_grad():
        layer.mlp_gamma.weight.mul_(2)
    x = torch.randn(X, dtype=torch.float64)
    assert relative_error(average(x, planes(dtype=x.dtype)), layer(x, planes(dtype=x.dtype))) > 1e-3


def test_gradient_checkpointing_gives_equal_gradients():
    layer = Diffusion(nn.GroupNorm(4, CHANNELS, affine=False)).double()
    sk.accelerate(layer)
    x, condition = torch.randn(X, dtype=torch.float64, requires_grad=True), planes(dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(layer(x, condition).sum(), [x, condition])
    y = torch.utils.checkpoint.checkpoint(layer, x, condition, use_reentrant=False)
    for found, value in zip(torch.autograd.grad(y.sum(), [x, condition]), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_accelerated_layers_can_be_compiled():
    layer = Original(instance()).eval()
    sk.accelerate(layer)
    x = torch.randn(X)
    with torch.no_grad():
        got = torch.compile(layer, backend="aot_eager")(x, planes())
        torch.testing.assert_close(got, layer(x, planes()))


def test_a_compiled_model_can_be_accelerated():
    torch.manual_seed(0)
    stock = Block(8, 4, wrap=plain).eval()
    model = torch.compile(copy.deepcopy(stock), backend="aot_eager")
    x, condition = torch.randn(X), planes()
    with torch.no_grad():
        before = model(x, condition)
        assert len(sk.accelerate(model).replaced) == 4
        after = model(x, condition)
    assert relative_error(after, stock(x, condition)) < 1e-5
    assert not torch.equal(after, before), "the compiled code is still the stock layers'"


def test_a_distributed_model_can_be_accelerated(tmp_path):
    torch.manual_seed(0)
    stock = Block(8, 4).double()
    torch.distributed.init_process_group("gloo", f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(copy.deepcopy(stock))
        assert len(sk.accelerate(model).replaced) == 4
        condition = planes(dtype=torch.float64)
        expected, found = (results(one, condition, torch.float64) for one in (stock, model))
    finally:
        torch.distributed.destroy_process_group()
    for key, value in expected.items():
        other = found[key if key in found else f"module.{key}"]
        assert relative_error(other, value) < 1e-9 or value.abs().max() < 1e-9, key


def test_the_table_of_the_benchmark():
    times = {
        ("eager", "eval"): 10.0,
        ("accelerated", "eval"): 4.0,
        ("accelerated, frozen", "eval"): 2.0,
        ("compiled", "eval"): 5.0,
    }
    times |= {("eager", "training"): 9.0, ("accelerated", "training"): 3.0}
    results = [Result.of(suite, "model", provider, [ms]) for (provider, suite), ms in times.items()]
    _, _, first, second = bench.table(results).splitlines()
    assert first == "| model | eval | 10 | 2.50 | 5.00 | 2.50 |"
    assert second == "| model | training | 9 | 3.00 |  |  |"


def test_the_models_of_the_benchmark_are_accelerated():
    mask = random_label_map("blobs", (1, 64, 64), CLASSES).one_hot()
    for _, model, call, _ in bench.cases(CLASSES, tiny=True):
        stock = copy.deepcopy(model.eval())
        sk.accelerate(model, strict=True)
        with torch.no_grad():
            torch.manual_seed(0)
            found = call(model, mask)
            torch.manual_seed(0)
            expected = call(stock, mask)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-4
