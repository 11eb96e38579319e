"""SPADE layers of other people's models, written here from their public behaviour, before and after `accelerate`."""

from __future__ import annotations

import copy
import io
import pickle
import re
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import spade_kernels as sk
from benchmarks import accelerate as bench
from spade_kernels.accelerate import FAMILIES, Family, Parts, convolution, shared_convolution
from spade_kernels.accelerate.block import AcceleratedBlock
from spade_kernels.accelerate.layer import AcceleratedLayer
from spade_kernels.condition import as_condition
from spade_kernels.functional import Weights
from spade_kernels.testing import random_label_map, relative_error
from spade_model.benchmark.results import Result

CHANNELS, CLASSES, HIDDEN = 8, 5, 6
X, SIZE = (2, CHANNELS, 6, 8), (12, 16)


class Original(nn.Module):
    """NVlabs/SPADE's layer, and those with its attributes."""

    norm_name = "param_free_norm"

    def __init__(
        self, norm: nn.Module, channels: int = CHANNELS, classes: int = CLASSES, k: int = 3, bias: bool = True, **kwargs
    ):
        super().__init__()
        self.add_module(self.norm_name, norm)
        self.mlp_shared = nn.Sequential(nn.Conv2d(classes, HIDDEN, k, padding=k // 2, bias=bias, **kwargs), nn.ReLU())
        self.mlp_gamma = nn.Conv2d(HIDDEN, channels, k, padding=k // 2, bias=bias, **kwargs)
        self.mlp_beta = nn.Conv2d(HIDDEN, channels, k, padding=k // 2, bias=bias, **kwargs)

    def maps(self, x: Tensor, segmap: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        hidden = self.mlp_shared(F.interpolate(segmap, x.shape[2:]))
        return getattr(self, self.norm_name)(x), self.mlp_gamma(hidden), self.mlp_beta(hidden)

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        normalized, gamma, beta = self.maps(x, segmap)
        return normalized * (1 + gamma) + beta


class Oasis(Original):
    norm_name = "first_norm"


class Diffusion(Original):
    norm_name = "norm"


class WithoutOne(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        normalized, gamma, beta = self.maps(x, segmap)
        return normalized * gamma + beta


class StableSR(Original):
    def forward(self, x_dic, segmap_dic: dict[str, Tensor], size: int | None = None) -> Tensor:
        x, segmap = (
            (x_dic, segmap_dic[str(x_dic.shape[-1])]) if size is None else (x_dic[str(size)], segmap_dic[str(size)])
        )
        hidden = self.mlp_shared(segmap)
        return self.param_free_norm(x) * (1 + self.mlp_gamma(hidden)) + self.mlp_beta(hidden)


class Normed(Original):
    """MONAI's: a leaky ReLU, and instance norms of gamma and beta, all in modules within modules."""

    def __init__(self, norm: nn.Module):
        super().__init__(norm)
        self.mlp_shared = nn.Sequential(self.mlp_shared[0], nn.Sequential(nn.LeakyReLU()))
        self.mlp_gamma = nn.Sequential(self.mlp_gamma, nn.Sequential(nn.InstanceNorm2d(CHANNELS)))
        self.mlp_beta = nn.Sequential(self.mlp_beta, nn.Sequential(nn.InstanceNorm2d(CHANNELS)))


class ConvBlock(nn.Module):
    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Imaginaire(nn.Module):
    def __init__(self, separate: bool, conditions: int = 1):
        super().__init__()
        self.norm = nn.InstanceNorm2d(CHANNELS, affine=True)
        self.separate = separate

        def conv(fin: int, fout: int) -> nn.Conv2d:
            return nn.Conv2d(fin, fout, 3, padding=1)

        hidden = [ConvBlock(conv(CLASSES, HIDDEN), nn.ReLU()) for _ in range(conditions)]
        if separate:
            self.mlps = nn.ModuleList(nn.Sequential(one) for one in hidden)
            self.gammas = nn.ModuleList(ConvBlock(conv(HIDDEN, CHANNELS)) for _ in hidden)
            self.betas = nn.ModuleList(ConvBlock(conv(HIDDEN, CHANNELS)) for _ in hidden)
        else:
            self.mlps = nn.ModuleList(nn.Sequential(one, ConvBlock(conv(HIDDEN, 2 * CHANNELS))) for one in hidden)

    def forward(self, x: Tensor, *cond_inputs: Tensor) -> Tensor:
        y = self.norm(x)
        for i, condition in enumerate(cond_inputs):
            hidden = self.mlps[i](F.interpolate(condition, x.shape[2:]))
            gamma, beta = (self.gammas[i](hidden), self.betas[i](hidden)) if self.separate else hidden.chunk(2, 1)
            y = y * (1 + gamma) + beta
        return y


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "original, instance": lambda: Original(nn.InstanceNorm2d(CHANNELS)),
    "original, batch": lambda: Original(nn.BatchNorm2d(CHANNELS, affine=False)),
    "original, 5x5": lambda: Original(nn.InstanceNorm2d(CHANNELS), k=5),
    "original, 1x1 without biases": lambda: Original(nn.InstanceNorm2d(CHANNELS), k=1, bias=False),
    "affine batch": lambda: Original(nn.BatchNorm2d(CHANNELS)),
    "norm per pixel": lambda: Original(nn.Softmax(1)),
    "OASIS": lambda: Oasis(nn.BatchNorm2d(CHANNELS, affine=False)),
    "semantic diffusion": lambda: Diffusion(nn.GroupNorm(4, CHANNELS, affine=False)),
    "affine group": lambda: Diffusion(nn.GroupNorm(4, CHANNELS)),
    "scale without 1": lambda: WithoutOne(nn.InstanceNorm2d(CHANNELS)),
    "StableSR": lambda: StableSR(nn.GroupNorm(4, CHANNELS)),
    "MONAI": lambda: Normed(nn.InstanceNorm2d(CHANNELS)),
    "imaginaire": lambda: Imaginaire(separate=True),
    "imaginaire, joint": lambda: Imaginaire(separate=False),
}


def planes(kind: str = "blobs", size: tuple[int, int] = SIZE, dtype: torch.dtype = torch.float32) -> Tensor:
    return random_label_map(kind, (2, *size), CLASSES).one_hot(dtype).contiguous()


def conditions(layer: nn.Module) -> dict[str, Tensor]:
    size = X[2:] if isinstance(layer, StableSR) else SIZE
    torch.manual_seed(1)
    return {
        "one-hot": planes(size=size),
        "dense": torch.rand(2, CLASSES, *size),
        "zero": torch.zeros(2, CLASSES, *size),
    }


def call(layer: nn.Module, x: Tensor, condition: Tensor) -> Tensor:
    return layer(x, {str(x.shape[-1]): condition}) if isinstance(layer, StableSR) else layer(x, condition)


def results(layer: nn.Module, condition: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    torch.manual_seed(2)
    x, condition = torch.randn(X, dtype=dtype, requires_grad=True), condition.to(dtype)
    layer.zero_grad()
    y = call(layer, x, condition)
    (y * torch.arange(y.numel(), dtype=dtype).view(y.shape).sin()).sum().backward()
    found = {"y": y, "x": x.grad} | {name: p.grad for name, p in layer.named_parameters()}
    return {name: t.detach().clone() for name, t in found.items()} | dict(layer.named_buffers())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients(name, training):
    torch.manual_seed(0)
    stock = LAYERS[name]().double().train(training)
    fast = copy.deepcopy(stock)
    report = sk.accelerate(fast)
    assert not report.left
    assert [one.layer for one in report.replaced] == [type(stock).__name__]
    assert isinstance(fast, type(stock))
    assert isinstance(fast, AcceleratedLayer)
    for condition in conditions(stock).values():
        expected = results(stock, condition, torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(stock), "forward", None)  # The kernels take the call.
            found = results(fast, condition, torch.float64)
        assert list(found) == list(expected)
        largest = max(t.abs().max() for t in expected.values() if t.is_floating_point())
        for key, value in expected.items():
            assert (found[key] - value).abs().max() <= 1e-10 * max(largest, 1), key


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_errors_are_within_twice_the_stock_layers(name, dtype):
    torch.manual_seed(0)
    layer = LAYERS[name]()
    fast = copy.deepcopy(layer)
    sk.accelerate(fast)
    for condition in conditions(layer).values():
        exact = results(copy.deepcopy(layer).double(), condition, torch.float64)
        # Rounded weights belong to the layer, not to its error.
        stock, ours = (results(copy.deepcopy(one).to(dtype), condition, dtype) for one in (layer, fast))
        if dtype == torch.bfloat16:
            exact = results(copy.deepcopy(layer).to(dtype).double(), condition.to(dtype), torch.float64)
        error, budget = ((one["y"].double() - exact["y"]).norm() for one in (ours, stock))
        assert error <= 2 * budget + 1e-6 * exact["y"].norm()


@pytest.mark.parametrize("name", LAYERS)
def test_frozen(name):
    torch.manual_seed(0)
    stock = LAYERS[name]().double().eval()
    fast = copy.deepcopy(stock)
    sk.accelerate(fast)
    sk.freeze(fast)
    x = torch.randn(X, dtype=torch.float64)
    for condition in conditions(stock).values():
        with torch.no_grad():
            for _ in range(3):  # The third call of a sampler takes the table of the second.
                assert (
                    relative_error(call(fast, x, condition.double().clone()), call(stock, x, condition.double()))
                    < 1e-10
                )
    with torch.no_grad():
        next(fast.parameters()).mul_(2)
        next(stock.parameters()).mul_(2)
        assert relative_error(call(fast, x, condition.double()), call(stock, x, condition.double())) < 1e-10


class Block(nn.Module):
    """The residual block of NVlabs/SPADE, OASIS, LivePortrait and others."""

    def __init__(
        self, fin: int, fout: int, spectral: bool = True, slope: float = 0.2, norm: Callable = nn.InstanceNorm2d
    ):
        super().__init__()
        middle = min(fin, fout)
        wrap = nn.utils.spectral_norm if spectral else nn.Identity()
        self.conv_0 = wrap(nn.Conv2d(fin, middle, 3, padding=1))
        self.conv_1 = wrap(nn.Conv2d(middle, fout, 3, padding=1))
        self.norm_0, self.norm_1 = Original(norm(fin), fin), Original(norm(middle), middle)
        self.learned_shortcut, self.slope = fin != fout, slope
        if self.learned_shortcut:
            self.conv_s = wrap(nn.Conv2d(fin, fout, 1, bias=False))
            self.norm_s = Original(norm(fin), fin)

    def forward(self, x: Tensor, seg: Tensor) -> Tensor:
        shortcut = self.conv_s(self.norm_s(x, seg)) if self.learned_shortcut else x
        dx = self.conv_0(F.leaky_relu(self.norm_0(x, seg), self.slope))
        return shortcut + self.conv_1(F.leaky_relu(self.norm_1(dx, seg), self.slope))


def batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, affine=False)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("channels", [(8, 8), (8, 4)])
@pytest.mark.parametrize(
    "options",
    [{}, {"spectral": False}, {"slope": 0.0}, {"norm": batch_norm}],
    ids=["spectral", "plain", "ReLU", "batch norm"],
)
def test_residual_blocks(options, channels, training):
    torch.manual_seed(0)
    stock = Block(*channels, **options).double().train(training)
    fast = copy.deepcopy(stock)
    report = sk.accelerate(fast)
    assert report.replaced[-1].family == "residual block"
    assert isinstance(fast, AcceleratedBlock)
    for condition in (planes(dtype=torch.float64), torch.rand(2, CLASSES, *SIZE, dtype=torch.float64)):
        expected, found = (results(block, condition, torch.float64) for block in (stock, fast))
        for key, value in expected.items():
            assert relative_error(found[key], value) < 1e-9 or value.abs().max() < 1e-9, key
    if not training:
        sk.freeze(fast)
        x = torch.randn(X, dtype=torch.float64)
        with torch.no_grad():
            assert relative_error(fast(x, condition), stock(x, condition)) < 1e-10


def test_a_block_with_another_activation_keeps_its_forward():
    block = Block(8, 8, slope=0.1)
    report = sk.accelerate(block)
    assert [one.name for one in report.replaced] == ["norm_0", "norm_1"]
    assert not report.left


def test_hooks_of_layers_in_blocks_run():
    block = Block(8, 4).double().eval()
    stock = copy.deepcopy(block)
    for one in (block, stock):
        one.norm_1.register_forward_hook(lambda module, args, y: 2 * y)
        one.conv_0.register_forward_hook(lambda module, args, y: y + 1)
    sk.accelerate(block)
    x = torch.randn(X, dtype=torch.float64)
    assert relative_error(block(x, planes(dtype=x.dtype)), stock(x, planes(dtype=x.dtype))) < 1e-10


def test_noise_before_the_labels_is_a_code_book_of_each_image():
    """OASIS concatenates a noise vector of each image and one-hot planes."""
    noise = torch.randn(2, 3, 1, 1).expand(2, 3, *SIZE)
    dense = torch.cat((noise, planes()), 1)
    label_map = as_condition(dense, 3 + CLASSES)
    assert isinstance(label_map, sk.LabelMap)
    assert torch.equal(label_map.one_hot(), dense)
    layer = Oasis(nn.InstanceNorm2d(CHANNELS), classes=3 + CLASSES).double()
    fast = copy.deepcopy(layer)
    sk.accelerate(fast)
    expected, found = (results(one, dense, torch.float64) for one in (layer, fast))
    assert all(relative_error(found[key], value) < 1e-10 for key, value in expected.items())
    edges = torch.cat((noise, planes(), (torch.rand(2, 1, *SIZE) < 0.2).float()), 1)
    assert torch.equal(as_condition(edges, 4 + CLASSES).one_hot(), edges)
    # Noise that differs from pixel to pixel is dense.
    assert isinstance(as_condition(torch.cat((torch.randn(2, 3, *SIZE), planes()), 1), 3 + CLASSES), Tensor)


def test_samplers_use_one_label_map_for_equal_masks():
    mask = planes()
    with torch.no_grad():
        first = as_condition(mask.clone(), CLASSES)
        assert as_condition(mask.clone(), CLASSES) is first
        assert as_condition(planes("noise"), CLASSES) is not first
    first = weakref.ref(as_condition(mask.clone(), CLASSES))
    assert first() is None, "training keeps no label map alive"


def test_restore_and_state():
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
    layer = Original(nn.InstanceNorm2d(CHANNELS)).double()
    sk.accelerate(layer)
    average = copy.deepcopy(layer)
    with torch.no_grad():
        layer.mlp_gamma.weight.mul_(2)
    x = torch.randn(X, dtype=torch.float64)
    assert relative_error(average(x, planes(dtype=x.dtype)), layer(x, planes(dtype=x.dtype))) > 1e-3


def test_layout_follows_the_input():
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    sk.accelerate(layer)
    x = torch.randn(X)
    layer(x, planes()).view(2, -1)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert layer(channels_last, planes()).is_contiguous(memory_format=torch.channels_last)


def test_gradient_checkpointing():
    layer = Diffusion(nn.GroupNorm(4, CHANNELS, affine=False)).double()
    sk.accelerate(layer)
    x, condition = torch.randn(X, dtype=torch.float64, requires_grad=True), planes(dtype=torch.float64).requires_grad_()
    expected = torch.autograd.grad(layer(x, condition).sum(), [x, condition])
    y = torch.utils.checkpoint.checkpoint(layer, x, condition, use_reentrant=False)
    for found, value in zip(torch.autograd.grad(y.sum(), [x, condition]), expected, strict=True):
        torch.testing.assert_close(found, value)


def test_compiled():
    layer = Original(nn.InstanceNorm2d(CHANNELS)).eval()
    sk.accelerate(layer)
    x = torch.randn(X)
    with torch.no_grad():
        got = torch.compile(layer, backend="aot_eager")(x, planes())
        torch.testing.assert_close(got, layer(x, planes()))


@pytest.mark.parametrize("name", ["original, instance", "MONAI", "affine group"])
def test_autocast_errs_no_more_than_stock(name):
    torch.manual_seed(0)
    stock = LAYERS[name]().eval()
    fast, exact = copy.deepcopy(stock), copy.deepcopy(stock).double()
    sk.accelerate(fast)
    x, condition = torch.randn(X), planes()
    with torch.no_grad():
        expected = exact(x.double(), condition.double())
        with torch.autocast("cpu", torch.bfloat16):
            error, budget = (relative_error(layer(x, condition).double(), expected) for layer in (fast, stock))
    assert error <= budget


def test_a_compiled_model_is_accelerated_later():
    torch.manual_seed(0)
    stock = Block(8, 4, spectral=False).eval()
    model = torch.compile(copy.deepcopy(stock), backend="aot_eager")
    x, condition = torch.randn(X), planes()
    with torch.no_grad():
        before = model(x, condition)
        assert len(sk.accelerate(model).replaced) == 4
        after = model(x, condition)
    assert relative_error(after, stock(x, condition)) < 1e-5
    assert not torch.equal(after, before), "the compiled code is still the stock layers'"


def test_distributed_data_parallel(tmp_path):
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


def test_a_condition_for_one_of_many_images_takes_the_own_forward():
    layer = Original(nn.InstanceNorm2d(CHANNELS)).double()
    stock = copy.deepcopy(layer)
    sk.accelerate(layer)
    x, condition = torch.randn(X, dtype=torch.float64), planes(dtype=torch.float64)[:1]
    assert torch.equal(layer(x, condition), stock(x, condition))


def test_parts_that_are_replaced_later():
    layer = Original(nn.InstanceNorm2d(CHANNELS)).double()
    sk.accelerate(layer)
    stock = copy.deepcopy(layer)
    sk.restore(stock)
    x, condition = torch.randn(X, dtype=torch.float64), planes(dtype=torch.float64)
    for change in (
        lambda one: one.mlp_beta.register_forward_hook(lambda module, args, y: y + 1),
        lambda one: setattr(one, "mlp_gamma", nn.Sequential(nn.Tanh(), nn.Conv2d(HIDDEN, CHANNELS, 1).double())),
        lambda one: setattr(one, "param_free_norm", nn.Identity()),
    ):
        torch.manual_seed(0)
        change(layer)
        torch.manual_seed(0)
        change(stock)
        assert relative_error(layer(x, condition), stock(x, condition)) < 1e-10


class WithMap(Original):
    def forward(self, x: Tensor, segmap: Tensor, similarity_map: Tensor | None = None) -> Tensor:
        y = super().forward(x, segmap)
        return y if similarity_map is None else y * similarity_map


def test_further_arguments_take_the_own_forward():
    layer = WithMap(nn.InstanceNorm2d(CHANNELS)).double()
    stock = copy.deepcopy(layer)
    assert sk.accelerate(layer).replaced
    x, condition, weights = torch.randn(X).double(), planes().double(), torch.rand(X[0], 1, *X[2:]).double()
    assert torch.equal(layer(x, condition, weights), stock(x, condition, weights))
    assert torch.equal(layer(x, segmap=condition, similarity_map=weights), stock(x, condition, weights))
    assert relative_error(layer(x, segmap=condition, similarity_map=None), stock(x, condition)) < 1e-12


def test_stable_sr_with_a_size():
    layer = StableSR(nn.GroupNorm(4, CHANNELS)).double()
    stock = copy.deepcopy(layer)
    sk.accelerate(layer)
    x, condition = torch.randn(X).double(), planes(size=X[2:]).double()
    assert relative_error(layer({"9": x}, {"9": condition}, 9), stock({"9": x}, {"9": condition}, size=9)) < 1e-12


class Bilinear(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, F.interpolate(segmap, x.shape[2:], mode="bilinear"))


class Absolute(Original):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap).abs()


def meta() -> nn.Module:
    return Original(nn.InstanceNorm2d(CHANNELS)).to("meta")


def lazy() -> nn.Module:
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    layer.mlp_gamma = nn.LazyConv2d(CHANNELS, 3, padding=1)
    return layer


def hooked() -> nn.Module:
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    layer.mlp_gamma.register_forward_hook(lambda module, args, y: y)
    return layer


def with_spectral_norm() -> nn.Module:
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    nn.utils.spectral_norm(layer.mlp_gamma)
    return layer


def with_gelu() -> nn.Module:
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    layer.mlp_shared[1] = nn.GELU()
    return layer


def with_large_gamma() -> nn.Module:
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    layer.mlp_gamma = nn.Conv2d(HIDDEN, CHANNELS, 5, padding=2)
    return layer


LEFT: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "another formula": (lambda: Absolute(nn.InstanceNorm2d(CHANNELS)), "results differ by"),
    "another resize": (lambda: Bilinear(nn.InstanceNorm2d(CHANNELS)), "results differ by"),
    "meta": (meta, "meta device"),
    "lazy": (lazy, "mlp_gamma|not initialized"),
    "scripted": (
        lambda: torch.jit.trace(Original(nn.InstanceNorm2d(CHANNELS)), (torch.randn(X), planes())),
        "scripted",
    ),
    "hooked": (hooked, "mlp_gamma has hooks"),
    "spectral norm": (with_spectral_norm, "mlp_gamma has hooks"),
    "GELU": (with_gelu, "activation GELU"),
    "two kernel sizes": (with_large_gamma, "different sizes"),
    "grouped": (lambda: Original(nn.InstanceNorm2d(CHANNELS), channels=8, classes=4, groups=2), "of another kind"),
    "reflecting": (lambda: Original(nn.InstanceNorm2d(CHANNELS), padding_mode="reflect"), "of another kind"),
    "two conditions": (lambda: Imaginaire(separate=True, conditions=2), "has 2 conditions"),
}


@pytest.mark.parametrize("name", LEFT)
def test_layers_that_are_left_alone(name):
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
    model = nn.Sequential(Original(nn.InstanceNorm2d(CHANNELS)), hooked())
    with pytest.raises(ValueError, match=r"1 layers cannot be accelerated; 1 \(Original\): .* has hooks"):
        sk.accelerate(model, strict=True)
    assert not any(isinstance(m, AcceleratedLayer) for m in model.modules())


@pytest.mark.parametrize(
    "model", [nn.Linear(2, 2), nn.Sequential(), sk.SPADE("spadebatch3x3", 4, 3)], ids=lambda model: type(model).__name__
)
def test_models_without_other_layers(model):
    assert str(sk.accelerate(model)) == "accelerate: there is no SPADE layer in this model"
    assert str(sk.accelerate(model, strict=True)).startswith("accelerate: there is no")


@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
    ids=["no grad", "inference", "autocast", "default device"],
)
def test_whatever_mode_the_caller_is_in(mode):
    layer = Block(8, 4)
    before = torch.get_rng_state()
    with mode():
        assert len(sk.accelerate(layer, strict=True).replaced) == 4
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_no_module():
    with pytest.raises(TypeError, match=r"takes an nn\.Module, got str"):
        sk.accelerate("model")


def test_twice_and_shared():
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    model = nn.ModuleList([layer, layer])
    assert len(sk.accelerate(model).replaced) == 1
    assert not sk.accelerate(model).replaced
    assert model[0] is model[1]


def test_the_report_is_a_table():
    report = sk.accelerate(nn.ModuleDict({"a": Original(nn.InstanceNorm2d(CHANNELS)), "b": hooked()}), measure=True)
    first, second, third = str(report).splitlines()
    assert first.split() == ["layer", "class", "family", "error", "speed-up"]
    assert second.split()[:3] == ["a", "Original", "SPADE"]
    assert second.endswith("x")
    assert third.startswith("left alone: b (Original): SPADE: mlp_gamma has hooks")


def test_a_family_from_outside():
    """Names of its own, and the condition before x."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.base = nn.InstanceNorm2d(CHANNELS)
            self.embed = nn.Sequential(nn.Conv2d(CLASSES, HIDDEN, 3, padding=1), nn.ReLU())
            self.to_scale, self.to_shift = (nn.Conv2d(HIDDEN, CHANNELS, 3, padding=1) for _ in range(2))

        def forward(self, mask: Tensor, x: Tensor) -> Tensor:
            hidden = self.embed(F.interpolate(mask, x.shape[2:]))
            return self.base(x) * self.to_scale(hidden) + self.to_shift(hidden)

    class Mine(Family):
        name = "mine"

        def candidates(self, module):
            if not hasattr(module, "to_scale"):
                return []
            shared, slope = shared_convolution("embed", module.embed)
            gamma, beta = (convolution(name, getattr(module, name)) for name in ("to_scale", "to_shift"))
            return [Parts(module.base, Weights.of(shared, gamma, beta, slope, scale_offset=0.0))]

        def inputs(self, module, mask, x):
            return x, mask

        def example(self, module, x, condition):
            return (condition, x), {}

    FAMILIES.append(Mine())
    try:
        layer = Layer().double()
        stock = copy.deepcopy(layer)
        assert [one.family for one in sk.accelerate(layer).replaced] == ["mine"]
        x = torch.randn(X, dtype=torch.float64)
        assert relative_error(layer(planes(dtype=x.dtype), x), stock(planes(dtype=x.dtype), x)) < 1e-12
    finally:
        FAMILIES.pop()


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
    for _, model, call, _ in bench.cases(random_label_map("blobs", (1, 64, 64), CLASSES).one_hot(), tiny=True):
        stock = copy.deepcopy(model.eval())
        sk.accelerate(model, strict=True)
        with torch.no_grad():
            torch.manual_seed(0)
            found = call(model)
            torch.manual_seed(0)
            expected = call(stock)
        for one, other in zip(found, expected, strict=True):
            assert relative_error(one, other) < 1e-4
