"""SPADE layers of other people's models before and after `accelerate`: results, gradients, forms of calls."""

from __future__ import annotations

import copy
import weakref

import pytest
import torch
import torch.nn.functional as F
from stand_ins import (
    CHANNELS,
    CLASSES,
    HIDDEN,
    LAYERS,
    SIZE,
    FewShot,
    Imaginaire,
    Oasis,
    Original,
    StableSR,
    VirtualTryOn,
    X,
    conditions,
    instance,
    planes,
    results,
)
from torch import Tensor, nn

import spade_kernels as sk
from spade_kernels.accelerate import FAMILIES, Family, Projection, formulas
from spade_kernels.accelerate.layer import AcceleratedLayer
from spade_kernels.condition import as_condition
from spade_kernels.testing import relative_error

pytestmark = pytest.mark.usefixtures("kernels_for_any_work")


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_results_and_gradients_equal_the_original_ones(name, training):
    torch.manual_seed(0)
    stock = LAYERS[name]().double().train(training)
    fast = copy.deepcopy(stock)
    report = sk.accelerate(fast)
    assert not report.left
    assert [one.layer for one in report.replaced] == [type(stock).__name__]
    assert isinstance(fast, type(stock))
    assert isinstance(fast, AcceleratedLayer)
    for given in conditions(stock).values():
        expected = results(stock, given, torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(stock), "forward", None)  # The original forward cannot run.
            found = results(fast, given, torch.float64)
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
    for given in conditions(layer).values():
        exact = results(copy.deepcopy(layer).double(), given, torch.float64)
        # The exact layer has the same rounded weights: only errors of the computation count.
        stock, ours = (results(copy.deepcopy(one).to(dtype), given, dtype) for one in (layer, fast))
        if dtype == torch.bfloat16:
            exact = results(copy.deepcopy(layer).to(dtype).double(), [one.to(dtype) for one in given], torch.float64)
        error, budget = ((one["y"].double() - exact["y"]).norm() for one in (ours, stock))
        assert error <= 2 * budget + 1e-6 * exact["y"].norm()


@pytest.mark.parametrize("name", LAYERS)
def test_frozen_layers_equal_the_original_ones(name):
    torch.manual_seed(0)
    stock = LAYERS[name]().double().eval()
    fast = copy.deepcopy(stock)
    sk.accelerate(fast)
    sk.freeze(fast)
    x = torch.randn(X, dtype=torch.float64)

    def error(given: list[Tensor]) -> float:
        found, expected = [], []
        for layer, y in ((stock, expected), (fast, found)):
            torch.manual_seed(3)
            y.append(layer.call(x, *given))
        return relative_error(found[0], expected[0])

    with torch.no_grad():
        for given in conditions(stock).values():
            for _ in range(3):  # The third call in a row takes the table of the second.
                assert error([one.double() for one in given]) < 1e-10
        for layer in (fast, stock):
            next(layer.parameters()).mul_(2)
        assert error([one.double() for one in given]) < 1e-10


def test_noise_planes_before_one_hot_planes_make_a_label_map():
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
    # A condition whose noise differs from pixel to pixel is dense.
    assert isinstance(as_condition(torch.cat((torch.randn(2, 3, *SIZE), planes()), 1), 3 + CLASSES), Tensor)


def test_samplers_use_one_label_map_for_equal_masks():
    mask = planes()
    with torch.no_grad():
        first = as_condition(mask.clone(), CLASSES)
        assert as_condition(mask.clone(), CLASSES) is first
        assert as_condition(planes("noise"), CLASSES) is not first
    first = weakref.ref(as_condition(mask.clone(), CLASSES))
    assert first() is None, "training keeps no label map alive"


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


def test_layout_follows_the_input():
    layer = Original(nn.InstanceNorm2d(CHANNELS))
    sk.accelerate(layer)
    x = torch.randn(X)
    layer(x, planes()).view(2, -1)
    channels_last = x.contiguous(memory_format=torch.channels_last)
    assert layer(channels_last, planes()).is_contiguous(memory_format=torch.channels_last)


def test_one_condition_for_many_images_runs_the_original_forward():
    layer = Original(nn.InstanceNorm2d(CHANNELS)).double()
    stock = copy.deepcopy(layer)
    sk.accelerate(layer)
    x, condition = torch.randn(X, dtype=torch.float64), planes(dtype=torch.float64)[:1]
    assert torch.equal(layer(x, condition), stock(x, condition))


def test_parts_can_be_replaced_later():
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


def test_further_arguments_run_the_original_forward():
    layer = WithMap(nn.InstanceNorm2d(CHANNELS)).double()
    stock = copy.deepcopy(layer)
    assert sk.accelerate(layer).replaced
    x, condition, weights = torch.randn(X).double(), planes().double(), torch.rand(X[0], 1, *X[2:]).double()
    assert torch.equal(layer(x, condition, weights), stock(x, condition, weights))
    assert torch.equal(layer(x, segmap=condition, similarity_map=weights), stock(x, condition, weights))
    assert relative_error(layer(x, segmap=condition, similarity_map=None), stock(x, condition)) < 1e-12


def test_stable_sr_takes_a_size():
    layer = StableSR(nn.GroupNorm(4, CHANNELS)).double()
    stock = copy.deepcopy(layer)
    sk.accelerate(layer)
    x, condition = torch.randn(X).double(), planes(size=X[2:]).double()
    assert relative_error(layer({"9": x}, {"9": condition}, 9), stock({"9": x}, {"9": condition}, size=9)) < 1e-12


def test_users_can_add_a_family():
    """The layer has attribute names of its own, and takes the condition before x."""

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
            return formulas(module.base, Projection.of(module, "embed", "to_scale", "to_shift"))

        def inputs(self, module, mask, x):
            return x, [mask]

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


def test_little_work_runs_the_original_forward(monkeypatch):
    monkeypatch.undo()
    layer = Original(instance())
    sk.accelerate(layer)
    monkeypatch.setattr(Original, "forward", lambda *args: "own")
    assert layer(torch.randn(X), planes()) == "own"
    assert isinstance(layer(torch.randn(2, CHANNELS, 256, 512), planes()), Tensor)


def test_conditions_can_be_left_out():
    layer = Imaginaire(conditions=(CLASSES, 3)).double()
    stock = copy.deepcopy(layer)
    assert sk.accelerate(layer).replaced
    x, first, second = torch.randn(X).double(), planes().double(), torch.rand(2, 3, *SIZE).double()
    for given in ([first, None], [None, second], [first], [None, None]):
        assert relative_error(layer(x, *given), stock(x, *given)) < 1e-12
    few = FewShot(3).double()
    stock = copy.deepcopy(few)
    assert sk.accelerate(few).replaced
    for maps in ([first, None], [None, second], first, [first]):
        maps_for_stock = maps if isinstance(maps, list) else [maps]
        assert relative_error(few(x, maps), stock(x, maps_for_stock)) < 1e-12


def test_noise_is_drawn_once_in_a_call():
    layer = VirtualTryOn(instance()).double()
    stock = copy.deepcopy(layer)
    assert sk.accelerate(layer).replaced
    x, seg, mask = torch.randn(X).double(), planes(size=X[2:]).double(), torch.rand(2, 1, *X[2:]).double()
    for given in ([seg], [seg, None], [seg, mask]):
        following = []
        for one in (layer, stock):
            torch.manual_seed(0)
            following.append((one(x, *given), torch.rand(1)))
        assert relative_error(following[0][0], following[1][0]) < 1e-12
        assert torch.equal(following[0][1], following[1][1])


def test_spectral_norm_iterates_once_in_a_call():
    layer = Imaginaire(wrap=torch.nn.utils.spectral_norm)
    stock = copy.deepcopy(layer)
    assert sk.accelerate(layer).replaced
    x, condition = torch.randn(X), planes()
    for one in (layer, stock):
        for _ in range(3):
            one(x, condition)
    for (name, found), expected in zip(layer.named_buffers(), stock.buffers(), strict=True):
        torch.testing.assert_close(found, expected, msg=name)
