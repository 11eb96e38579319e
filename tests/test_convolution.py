"""The residual blocks' convolution against `torch.nn.utils.spectral_norm` and against `nn.Conv2d`."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spade_kernels.convolution import Conv2d
from spade_kernels.testing import relative_error

FIN, FOUT = 6, 5
KERNELS = [(1, 0), (3, 1)]
LAYOUTS = {"contiguous": torch.contiguous_format, "channels-last": torch.channels_last}
DOUBLE = torch.float64

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning"),
    pytest.mark.parametrize("bias", [True, False]),
    pytest.mark.parametrize(("kernel_size", "padding"), KERNELS),
]


def twins(kernel_size: int, padding: int, bias: bool, dtype: torch.dtype = DOUBLE) -> tuple[Conv2d, nn.Module]:
    """Ours and stock, with the same weights."""
    stock = nn.Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias)
    stock = nn.utils.spectral_norm(stock).to(dtype)
    ours = Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias, spectral=True).to(dtype)
    ours.load_state_dict(stock.state_dict())
    return ours, stock


def image(layout: str = "contiguous", dtype: torch.dtype = DOUBLE) -> Tensor:
    x = torch.randn(2, FIN, 7, 9, dtype=dtype).contiguous(memory_format=LAYOUTS[layout])
    return x.requires_grad_()


def is_stored_as_usual(weight: Tensor) -> bool:
    return weight.is_contiguous()


def through_gain(conv: Conv2d, x: Tensor) -> Tensor:
    """The gain is folded into the input, which is how a residual block calls it."""
    weight, gain = conv.weight_and_inv_sigma()
    return conv(x if gain is None else x * gain, weight)


def step(run, module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """One forward and backward: the output, every gradient, and the buffers as the forward left them."""
    module.zero_grad()
    x = x.detach().requires_grad_()
    y = run(x)
    y.backward(torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).cos())
    gradients = {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    return {"y": y, "gradient of x": x.grad, **gradients, **dict(module.named_buffers())}


def assert_same(got: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-12) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert relative_error(got[name], value) < limit, name


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("way", ["forward", "through gain"])
def test_training_and_eval_equal_spectral_norm(kernel_size, padding, bias, way, layout):
    ours, stock = twins(kernel_size, padding, bias)
    run = ours if way == "forward" else lambda x: through_gain(ours, x)
    optimizers = [torch.optim.Adam(module.parameters(), lr=0.1) for module in (ours, stock)]
    for _ in range(5):
        x = image(layout)
        assert_same(step(run, ours, x), step(stock, stock, x))
        for optimizer in optimizers:
            optimizer.step()
        assert is_stored_as_usual(ours.weight_orig)
    for module in (ours, stock):
        module.eval()
    x = image(layout)
    assert_same(step(run, ours, x), step(stock, stock, x))


def test_two_forwards_before_one_backward(kernel_size, padding, bias):
    ours, stock = twins(kernel_size, padding, bias)
    first, second = image(), image()
    assert_same(
        step(lambda x: ours(x) + through_gain(ours, second), ours, first),
        step(lambda x: stock(x) + stock(second), stock, first),
    )


def test_eval_divides_by_a_negative_sigma(kernel_size, padding, bias):
    ours, stock = twins(kernel_size, padding, bias)
    stock.weight_u.neg_()
    ours.load_state_dict(stock.state_dict())
    for module in (ours, stock):
        module.eval()
    x = image()
    assert ours.weight_and_inv_sigma() == (None, None)
    assert_same(step(ours, ours, x), step(stock, stock, x))


def test_vectors_that_were_never_iterated(kernel_size, padding, bias):
    """In eval mode sigma may have either sign then."""
    signs = set()
    for _ in range(12):
        ours = Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias, spectral=True).to(DOUBLE).eval()
        stock = nn.utils.spectral_norm(nn.Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias)).to(DOUBLE).eval()
        stock.load_state_dict(ours.state_dict())
        x = image()
        assert_same(step(ours, ours, x), step(stock, stock, x))
        sigma = ours.weight_u @ ours.weight_orig.flatten(1) @ ours.weight_v
        signs.add(sigma.sign().item())
    assert signs == {-1, 1}


def test_state_dicts_are_exchanged(kernel_size, padding, bias):
    ours, stock = twins(kernel_size, padding, bias)
    assert list(ours.state_dict()) == list(stock.state_dict())
    for value, expected in zip(ours.state_dict().values(), stock.state_dict().values(), strict=True):
        assert torch.equal(value, expected)
    assert is_stored_as_usual(ours.weight_orig)
    x = image()
    step(ours, ours, x)
    stock.load_state_dict(ours.state_dict())
    assert_same(step(ours, ours, x), step(stock, stock, x))


def test_without_spectral_norm_it_is_a_convolution(kernel_size, padding, bias):
    stock = nn.Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias).to(DOUBLE)
    ours = Conv2d(FIN, FOUT, kernel_size, padding=padding, bias=bias).to(DOUBLE)
    ours.load_state_dict(stock.state_dict())
    assert is_stored_as_usual(ours.weight)
    assert ours.weight_and_inv_sigma() == (None, None)
    x = image()
    assert_same(step(lambda x: through_gain(ours, x), ours, x), step(stock, stock, x))
    stock.load_state_dict(ours.state_dict())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda conv: pickle.loads(pickle.dumps(conv))])
def test_copies(kernel_size, padding, bias, copied):
    conv, _ = twins(kernel_size, padding, bias)
    twin = copied(conv)
    assert is_stored_as_usual(twin.weight_orig)
    x = image()
    assert_same(step(twin, twin, x), step(conv, conv, x))
    with torch.no_grad():
        twin.weight_orig.zero_()
    assert conv.weight_orig.abs().min() > 0


@pytest.mark.parametrize("way", ["forward", "through gain"])
@pytest.mark.parametrize("training", [True, False])
def test_error_in_float32(kernel_size, padding, bias, way, training):
    ours, stock = twins(kernel_size, padding, bias, torch.float32)
    for module in (ours, stock):
        module.train(training)
    x = image(dtype=torch.float32)
    twin = copy.deepcopy(stock).double()
    exact = step(twin, twin, x.double())
    expected = step(stock, stock, x)
    got = step(ours if way == "forward" else lambda x: through_gain(ours, x), ours, x)
    for name, value in exact.items():
        limit = 2 * relative_error(expected[name], value) + torch.finfo(torch.float32).eps
        assert relative_error(got[name], value) <= limit, name


def test_weight_of_spectral_norm(kernel_size, padding, bias):
    """Adapters and quantizers read `weight`: it is what `torch.nn.utils.spectral_norm` leaves after a call."""
    ours, stock = twins(kernel_size, padding, bias)
    for training in (True, False):
        ours.train(training)(image())
        stock.train(training)(image())
        assert relative_error(ours.weight, stock.weight) < 1e-12


@pytest.mark.parametrize("spectral", [True, False])
def test_stored_as_stock_modules_are(kernel_size, padding, bias, spectral, tmp_path):
    """For what flattens parameters, files that take contiguous tensors only, and buckets of gradients."""
    conv = Conv2d(8, 40, kernel_size, padding=padding, bias=bias, spectral=spectral)
    # Pixels for each kind of convolution: in training, few and many of them; a small input beside a large weight.
    for size in (2, 32):
        conv.zero_grad()
        through_gain(conv, torch.randn(1, 8, size, size)).square().sum().backward()
        for parameter in conv.parameters():
            assert parameter.is_contiguous()
            assert parameter.grad.is_contiguous()
            parameter.view(parameter.shape[0], -1)
    nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(conv.parameters()) * 2, conv.parameters())
    save_file(conv.state_dict(), tmp_path / "conv.safetensors")
    for name, value in load_file(tmp_path / "conv.safetensors").items():
        assert torch.equal(value, conv.state_dict()[name])


def test_moved_to_channels_last(kernel_size, padding, bias):
    ours, stock = twins(kernel_size, padding, bias)
    ours.to(memory_format=torch.channels_last)
    x = image()
    assert_same(step(lambda x: through_gain(ours, x), ours, x), step(stock, stock, x))


def test_optimizer_states_in_channels_last(kernel_size, padding, bias):
    """Runs of earlier versions have channels-last weights, and optimizer states of that layout."""
    x, results = image(), []
    for layout in LAYOUTS.values():
        torch.manual_seed(0)
        conv, _ = twins(kernel_size, padding, bias)
        optimizer = torch.optim.Adam(conv.parameters(), lr=0.1)
        for _ in range(3):
            step(conv, conv, x)
            optimizer.step()
            state = optimizer.state_dict()
            for values in state["state"].values():
                for name, value in values.items():
                    values[name] = value.contiguous(memory_format=layout) if value.dim() == 4 else value
            optimizer.load_state_dict(state)
        results.append(conv.state_dict())
    for name, value in results[0].items():
        assert torch.equal(results[1][name], value), name
