"""Derivatives beyond the first, in forward mode and under torch.func are those of the stock layer."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from functools import partial

import pytest
import torch
from test_foreign_modules import stock_block, with_stock_convolutions
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from spade_kernels import LabelMap, freeze
from spade_kernels.convolution import Conv2d
from spade_kernels.one_hot import detect_one_hot
from spade_kernels.testing import random_label_map, random_spade, stock_spade
from spade_model.benchmark.stock import stock_generator
from spade_model.networks import SPADEGenerator
from spade_model.networks.generator import SPADEResnetBlock

pytestmark = pytest.mark.usefixtures("backend")

N, C, H, W, CLASSES = 2, 3, 6, 5, 4
DOUBLE = {"dtype": torch.float64}
NORMS = [("instance", True), ("batch", True), ("batch", False), ("syncbatch", True)]
FORMS = ["label map", "dense"]


def condition(form: str, upsample: int = 1) -> tuple[LabelMap | Tensor, Tensor]:
    """For the layer, and the same for the stock layer."""
    label_map = random_label_map("blobs", (N, H * upsample, W * upsample), CLASSES)
    planes = label_map.one_hot(torch.float64)
    return (label_map, planes) if form == "label map" else (planes + 0.5, planes + 0.5)


def close(got, expected) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def penalty_gradients(run: Callable[..., Tensor], inputs: list[Tensor], weights: list[Tensor]) -> list[Tensor]:
    """Gradients, for inputs and weights, of the squared gradients of the inputs and weights."""
    y = run(*inputs)
    y = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum() + y.square().sum()
    first = torch.autograd.grad(y, [*inputs, *weights], create_graph=True)
    return list(torch.autograd.grad(sum(g.square().sum() for g in first), [*inputs, *weights]))


@pytest.mark.parametrize(("norm", "training"), NORMS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("upsample", [1, 2])
def test_second_derivatives_of_a_layer(form, norm, training, upsample):
    layer = random_spade(f"spade{norm}3x3", C, CLASSES).double().train(training)
    segmap, planes = condition(form, upsample)
    x, gain = torch.randn(N, C, H, W, **DOUBLE).requires_grad_(), torch.tensor([1.5], **DOUBLE).requires_grad_()
    inputs = [x, gain, planes.requires_grad_()] if form == "dense" else [x, gain]

    def ours(x: Tensor, gain: Tensor, planes: Tensor | None = None) -> Tensor:
        return layer(x, segmap if planes is None else planes, 0.2, gain=gain, upsample=upsample)

    def stock(x: Tensor, gain: Tensor, given: Tensor | None = None) -> Tensor:
        x = nn.functional.interpolate(x, scale_factor=upsample)
        return stock_spade(layer, x, planes if given is None else given, 0.2) * gain

    weights = list(layer.parameters())
    close(penalty_gradients(ours, inputs, weights), penalty_gradients(stock, inputs, weights))


def test_second_derivatives_of_spectral_norm():
    conv, stock = Conv2d(C, 4, 3, padding=1, spectral=True).double(), nn.Conv2d(C, 4, 3, padding=1).double()
    stock = nn.utils.spectral_norm(stock)
    stock.load_state_dict(conv.state_dict())
    x = torch.randn(N, C, H, W, **DOUBLE).requires_grad_()
    expected = penalty_gradients(stock, [x], list(stock.parameters()))
    # One power iteration: both start from the same vectors.
    close(penalty_gradients(conv, [x], [conv.bias, conv.weight_orig]), expected)


@pytest.fixture(scope="module")
def generator() -> SPADEGenerator:
    return SPADEGenerator(CLASSES, ngf=2, crop_size=32).double()


@pytest.mark.parametrize("training", [True, False])
def test_second_derivatives_of_the_generator(generator, training):
    """A penalty like that of path lengths: how fast the image changes with the first feature map and all weights."""
    generator.train(training)
    stock = stock_generator(generator, "eager", training=training)
    label_map = random_label_map("blobs", (N, 32, 32), CLASSES)

    def penalty(network: nn.Module) -> dict[str, Tensor]:
        image = network(label_map)
        (first,) = torch.autograd.grad((image * image.detach().cos()).sum(), network.fc.weight, create_graph=True)
        first.square().sum().backward()
        # Biases that a norm follows have no effect, and gradients of rounding only.
        return {name: p.grad for name, p in network.named_parameters() if p.grad is not None}

    generator.zero_grad()
    got, expected = penalty(generator), penalty(stock)
    assert got.keys() == expected.keys()
    largest = max(g.abs().max() for g in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(got[name] / largest, value / largest, rtol=1e-8, atol=1e-11, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_second_derivatives_of_a_checkpointed_layer(form):
    layer = random_spade("spadeinstance3x3", C, CLASSES).double()
    segmap, _ = condition(form)
    x, weights = torch.randn(N, C, H, W, **DOUBLE).requires_grad_(), list(layer.parameters())
    got = penalty_gradients(lambda x: checkpoint(layer, x, segmap, use_reentrant=False), [x], weights)
    close(got, penalty_gradients(lambda x: layer(x, segmap), [x], weights))


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor], object]] = {
    "grad": lambda f, x: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vjp": lambda f, x: torch.func.vjp(f, x)[1](x),
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x + 1,)),
    "vmap": lambda f, x: torch.func.vmap(f)(torch.stack((x, x + 1))),
    "gradients of each": lambda f, x: torch.func.vmap(torch.func.grad(lambda x: f(x).sin().sum()))(
        torch.stack((x, 2 * x))
    ),
    "jacrev": lambda f, x: torch.func.jacrev(f)(x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "hessian": lambda f, x: torch.func.hessian(lambda x: f(x).square().sum())(x),
    "autograd hessian": lambda f, x: torch.autograd.functional.hessian(lambda x: f(x).square().sum(), x),
    "autograd hessian at once": lambda f, x: torch.autograd.functional.hessian(
        lambda x: f(x).square().sum(), x, vectorize=True
    ),
    "several gradients at once": lambda f, x: torch.func.vmap(
        partial(torch.autograd.grad, f(x.requires_grad_()), x, retain_graph=True)
    )(torch.stack((x, 2 * x)).detach()),
    "jacobian at once": lambda f, x: torch.autograd.functional.jacobian(f, x, vectorize=True),
}


# Batches of gradients reach the kernels one by one, of which torch warns.
@pytest.mark.filterwarnings("ignore:There is a performance drop", "ignore:.*torch.jit.script.*:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("norm", ["instance", "batch"])
@pytest.mark.parametrize("form", FORMS)
def test_transforms(form, norm, transform):
    layer = random_spade(f"spade{norm}3x3", C, CLASSES).double()
    # Running statistics cannot follow a batch of batches: torch says so, of every batch norm.
    layer.param_free_norm.track_running_stats = False
    segmap, planes = condition(form)
    x, run = torch.randn(N, C, H, W, **DOUBLE), TRANSFORMS[transform]
    if "ess" in transform or "jac" in transform:
        x = x[..., :2, :2]
    before = layer(x, segmap)
    close(run(lambda x: layer(x, segmap, 0.2), x), run(lambda x: stock_spade(layer, x, planes, 0.2), x))
    assert torch.equal(layer(x, segmap), before), "the transform left something of its own behind"


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("transform", ["grad", "jvp", "vmap", "jacrev", "jacfwd", "hessian"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_transforms_of_a_block(transform, dtype):
    """In float32 its convolutions choose between layouts."""
    block = SPADEResnetBlock(8, 4, "spectralspadebatch3x3", CLASSES).to(dtype).eval()
    twin = with_stock_convolutions(block).eval()
    segmap, planes = condition("label map")
    x, run = torch.randn(N, 8, 2, 2, dtype=dtype), TRANSFORMS[transform]
    got, expected = run(lambda x: block(x, segmap), x), run(lambda x: stock_block(twin, x, planes.to(dtype), 1), x)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def test_gradient_of_a_training_convolution_with_spectral_norm():
    """Its buffers are updated within the transform, as PyTorch's own spectral norm updates them."""
    conv = Conv2d(3, 5, 3, padding=1, spectral=True).double()
    stock = torch.nn.utils.spectral_norm(nn.Conv2d(3, 5, 3, padding=1).double())
    stock.load_state_dict(conv.state_dict())
    stock.eval()(torch.zeros(1, 3, 4, 4, **DOUBLE))
    x, found = torch.randn(2, 3, 6, 6, **DOUBLE), []
    for one in (conv, stock.train()):
        weights = {name: p.detach() for name, p in one.named_parameters()}
        found.append(torch.func.grad(lambda w, one=one: functional_call(one, w, (x,)).square().sum())(weights))
    close(*found)
    torch.testing.assert_close(dict(conv.named_buffers()), dict(stock.named_buffers()))


CONDITIONS: dict[str, Callable[[LabelMap], LabelMap | Tensor]] = {
    "label map": lambda label_map: label_map,
    "label map made inside": lambda label_map: LabelMap(label_map.labels + 0, CLASSES)[:],
    "labels": lambda label_map: label_map.labels,
    "one-hot": lambda label_map: label_map.one_hot(),
}


@pytest.mark.parametrize("kind", CONDITIONS)
def test_what_a_transform_meets_first_is_kept_for_all(kind):
    layer = random_spade("spadeinstance3x3", C, CLASSES)
    label_map = random_label_map("blobs", (N, H, W), CLASSES)
    x, given, seen = torch.randn(N, C, H, W), CONDITIONS[kind](label_map), []

    def run(x: Tensor) -> Tensor:
        seen.append(CONDITIONS[kind](label_map) if "inside" in kind else given)
        return layer(x, seen[-1]).sum()

    gradient = torch.func.grad(run)(x)
    for segmap in [*seen, given]:
        torch.testing.assert_close(torch.func.vmap(torch.func.grad(run))(x.unsqueeze(0))[0], gradient)
        known = detect_one_hot(segmap) if kind == "one-hot" else segmap
        if isinstance(known, LabelMap):
            pickle.dumps(known)
            tensors = [*known.window_index((H, W), 3).segments(), (known.codes,)]
            assert not any(torch._C._functorch.is_functorch_wrapped_tensor(t) for ts in tensors for t in ts)


def test_mapping_over_label_maps_says_what_to_do():
    layer = random_spade("spadeinstance3x3", C, CLASSES)
    x, labels = torch.randn(N, C, H, W), torch.zeros(3, N, H, W, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"cannot map over label maps: .* one batch"):
        torch.func.vmap(lambda labels: layer(x, labels))(labels)


def test_functional_call_and_its_gradient():
    layer = random_spade("spadeinstance3x3", C, CLASSES).double()
    segmap, _ = condition("label map")
    x = torch.randn(N, C, H, W, **DOUBLE)
    weights = {name: (2 * p).detach().requires_grad_() for name, p in layer.named_parameters()}
    y = functional_call(layer, weights, (x, segmap))
    expected = dict(zip(weights, torch.autograd.grad(y.square().sum(), weights.values()), strict=True))
    close(torch.func.grad(lambda w: functional_call(layer, w, (x, segmap)).square().sum())(weights), expected)


def test_frozen_layers_have_every_derivative():
    layer = random_spade("spadebatch3x3", C, CLASSES).double()
    segmap, planes = condition("label map")
    freeze(layer)
    x = torch.randn(N, C, H, W, **DOUBLE)
    with torch.no_grad():
        got = torch.func.jvp(lambda x: layer(x, segmap), (x,), (x,))
    close(got, torch.func.jvp(lambda x: stock_spade(layer, x, planes), (x,), (x,)))
