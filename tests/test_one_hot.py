"""One-hot tensors handed to the layers: which are recognised, that the answer is exact, and how long it is kept."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from spade_kernels import SPADE, LabelMap
from spade_kernels import one_hot as one_hot_module
from spade_kernels.condition import as_condition, conv2d
from spade_kernels.testing import forward_backward, random_label_map, random_labels, random_spade

SHAPE, CLASSES = (2, 21, 18), 5
CONDITIONS = [{}, {"edges": True}, {"ignore": True}, {"edges": True, "ignore": True}]
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda t: t.contiguous(),
    "channels-last": lambda t: t.contiguous(memory_format=torch.channels_last),
    "every second column": lambda t: t.repeat_interleave(2, 3)[..., ::2],
}


def one_hot(seed: int = 0, **condition: bool) -> Tensor:
    return random_label_map("noise", SHAPE, CLASSES, seed=seed, **condition).one_hot().contiguous()


def detected(planes: Tensor) -> LabelMap:
    label_map = one_hot_module.detect_one_hot(planes)
    assert label_map is not None
    assert label_map.channels == planes.shape[1]
    assert torch.equal(label_map.one_hot(planes.dtype), planes)
    return label_map


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_exactly_what_was_given(dtype, layout, condition):
    detected(LAYOUTS[layout](one_hot(**condition).to(dtype)))


@pytest.mark.parametrize("planes", [torch.zeros(1, 1, 3, 4), torch.ones(1, 1, 3, 4), torch.eye(12).view(1, 12, 3, 4)])
def test_one_plane_and_one_of_every_class(planes):
    detected(planes)
    detected(planes[:, -1:])


@pytest.mark.parametrize(("dtype", "classes"), [(torch.bfloat16, 300), (torch.float16, 2100)])
def test_more_classes_than_the_dtype_has_integers(dtype, classes):
    detected(F.one_hot(random_labels("noise", SHAPE, classes), classes).permute(0, 3, 1, 2).to(dtype))


@pytest.mark.parametrize("autocast", [False, True])
def test_many_classes_in_autocast(autocast):
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        detected(F.one_hot(random_labels("noise", SHAPE, 300), 300).permute(0, 3, 1, 2).float())


@pytest.mark.parametrize("value", [0.5, 2.0, -1.0, 1e-30, 1 + 2**-20, float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("plane", [0, 3, 5])
@pytest.mark.parametrize("pixel", [(0, 0, 0), (1, 7, 8)])
def test_one_other_value_is_noticed(pixel, plane, value):
    image, y, x = pixel
    planes = one_hot(edges=True)
    planes[image, plane, y, x] = value
    assert one_hot_module.detect_one_hot(planes) is None


def test_two_classes_at_a_pixel_are_noticed():
    planes = one_hot(edges=True)
    planes[1, :2, 7, 8] = 1
    planes[1, 2:, 7, 8] = 0
    assert one_hot_module.detect_one_hot(planes) is None
    # Planes 1 and 2 together codebook_matmul as much as plane 4 alone.
    planes[1, :, 7, 8] = torch.tensor([0.0, 1, 1, 0, 0, 0])
    assert one_hot_module.detect_one_hot(planes) is None


@pytest.mark.parametrize("condition", CONDITIONS)
def test_layers_compute_the_same_as_from_the_label_map(condition):
    label_map = random_label_map("blobs", SHAPE, CLASSES, **condition)
    layer, x = random_spade("spadebatch3x3", 4, label_map.channels), torch.randn(2, 4, 11, 9)
    twin = copy.deepcopy(layer)
    expected = forward_backward(lambda x: layer(x, label_map), layer, x, x)
    planes = label_map.one_hot()
    got = forward_backward(lambda x: twin(x, planes), twin, x, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-5, atol=1e-5, msg=name)


class Counted:
    """Counts the conversions."""

    def __init__(self, monkeypatch):
        self.count, self._read = 0, one_hot_module.read_one_hot
        monkeypatch.setattr(one_hot_module, "read_one_hot", self)

    def __call__(self, planes: Tensor, edges: bool) -> LabelMap | None:
        self.count += 1
        return self._read(planes, edges)


@pytest.fixture
def conversions(monkeypatch) -> Counted:
    return Counted(monkeypatch)


@pytest.mark.parametrize("inference", [False, True])
def test_the_layers_of_a_forward_pass_convert_once(conversions, inference):
    layers = [SPADE("spadebatch3x3", 4, CLASSES) for _ in range(3)]
    with torch.inference_mode(inference):
        planes = one_hot()
        for layer in layers:
            layer(torch.randn(2, 4, 7, 6), planes)
        found = {id(detected(planes)) for _ in range(2)}
        assert len(found) == conversions.count == 1
        detected(planes.clone())
    assert conversions.count == 2


def test_that_a_tensor_is_not_one_hot_is_remembered(conversions):
    planes = one_hot()
    planes[0, 0, 7, 8] = 0.5
    for _ in range(3):
        assert as_condition(planes, CLASSES) is planes
    assert conversions.count == 1
    torch_features = torch.randn(2, CLASSES, 21, 18)
    assert as_condition(torch_features, CLASSES) is torch_features
    assert conversions.count == 1


CHANGES: dict[str, Callable[[Tensor, Tensor], object]] = {
    "copy_": lambda planes, other: planes.copy_(other),
    "through a view": lambda planes, other: planes[0].view(-1).copy_(other[0].flatten()),
    "through detach()": lambda planes, other: planes.detach().copy_(other),
    "other memory": lambda planes, other: setattr(planes, "data", other),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_noticed(change):
    planes = one_hot()
    before = detected(planes)
    CHANGES[change](planes, one_hot(seed=1))
    assert not torch.equal(detected(planes).codes, before.codes)
    planes[0, 0, 0, 1] = 0.5
    assert one_hot_module.detect_one_hot(planes) is None


def in_inference_mode() -> tuple[Tensor, Callable[[Tensor], object]]:
    with torch.inference_mode():
        planes = one_hot(edges=True)

    @torch.inference_mode()
    def change(to: Tensor) -> None:
        planes.copy_(to)

    return planes, change


def from_numpy() -> tuple[Tensor, Callable[[Tensor], object]]:
    array = one_hot(edges=True).numpy()
    return torch.from_numpy(array), lambda to: np.copyto(array, to.numpy())


@pytest.mark.parametrize("make", [in_inference_mode, from_numpy])
def test_changes_that_pytorch_does_not_count_are_noticed(make):
    planes, change = make()
    kept = detected(planes)
    assert detected(planes) is kept
    other = one_hot(edges=True)
    other[1, -1, 3, 4] = 1 - other[1, -1, 3, 4]
    change(other)
    assert detected(planes) is not kept
    for value in (0.5, 1.0):
        other[1, :2, 3, 4] = value
        change(other)
        assert one_hot_module.detect_one_hot(planes) is None


def test_neither_keeps_the_other_alive():
    planes = one_hot()
    label_map = weakref.ref(detected(planes))
    tensor = weakref.ref(planes)
    gc.collect()
    assert label_map() is not None
    del planes
    gc.collect()
    assert tensor() is label_map() is None


def test_threads():
    planes = [one_hot(seed) for seed in range(4)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(detected, planes * 20))


def test_gradients_for_the_condition():
    planes = one_hot().double().requires_grad_()
    assert as_condition(planes, CLASSES) is planes
    with torch.no_grad():
        detected(planes)
    assert as_condition(planes, CLASSES) is planes
    conv2d(as_condition(planes, CLASSES), torch.ones(1, CLASSES, 3, 3).double()).sum().backward()
    assert planes.grad is not None
    with forward_ad.dual_level():
        assert one_hot_module.detect_one_hot(forward_ad.make_dual(planes.detach(), torch.ones_like(planes))) is None


def seen_in(transform: Callable[[Callable[[Tensor], Tensor], Tensor], object]) -> list[LabelMap | None]:
    """Label maps that are detected while a function is traced."""
    seen = []

    def function(planes: Tensor) -> Tensor:
        seen.append(one_hot_module.detect_one_hot(planes))
        return planes + 1

    transform(function, one_hot())
    assert seen
    return seen


def test_nothing_is_recognised_where_values_cannot_be_read():
    def in_fake_mode(function: Callable[[Tensor], Tensor], planes: Tensor) -> None:
        with FakeTensorMode() as mode:
            function(mode.from_tensor(planes))

    assert seen_in(lambda function, planes: torch.jit.trace(function, planes, check_trace=False)) == [None]
    assert seen_in(lambda function, planes: make_fx(function)(planes)) == [None]
    assert seen_in(lambda function, planes: torch.func.vmap(function)(planes.unsqueeze(0))) == [None]
    assert seen_in(in_fake_mode) == [None]
    assert one_hot_module.detect_one_hot(one_hot().to("meta")) is None
    assert one_hot_module.detect_one_hot(one_hot()[:0]) is None
    assert one_hot_module.detect_one_hot(one_hot().to(torch.float8_e5m2)) is None
    compiled = torch.compile(
        lambda planes: planes.sum() if one_hot_module.detect_one_hot(planes) is None else 0, backend="eager"
    )
    assert compiled(one_hot()) != 0
