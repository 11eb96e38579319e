"""Inputs, the stock layer and the error budget, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels.label_map import LabelMap
from spade_kernels.layers import SPADE

MASK_KINDS = ("blobs", "noise", "stripes", "constant", "islands")


def random_labels(kind: str, shape: tuple[int, int, int], num_labels: int, seed: int = 0) -> Tensor:
    """(N, H, W) int64 class ids below num_labels on the default device, with the same values on every device.

    Args:
        kind: "blobs" (regions with ragged borders, as in a photograph), "noise" (every pixel on its own), "stripes"
            (diagonal), "constant" (one class per image) or "islands" (one class with single pixels of others).
    """
    device = torch.get_default_device()
    with torch.device("cpu"):
        return _labels(kind, shape, num_labels, seed).to(device)


def _labels(kind: str, shape: tuple[int, int, int], num_labels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n, height, width = shape

    def anywhere(*size: int) -> Tensor:
        return torch.randint(num_labels, size, generator=generator)

    if kind == "blobs":
        coarse = torch.rand(n, num_labels, height // 8 + 2, width // 8 + 2, generator=generator)
        return F.interpolate(coarse, size=(height, width), mode="bicubic").argmax(1)
    if kind == "noise":
        return anywhere(n, height, width)
    if kind == "stripes":
        across = torch.arange(height).view(-1, 1) + 2 * torch.arange(width)
        return (across // 3 + anywhere(n, 1, 1)) % num_labels
    background = anywhere(n, 1, 1).expand(shape)
    if kind == "constant":
        return background.clone()
    if kind == "islands":
        alone = torch.rand(shape, generator=generator) < 0.05
        return torch.where(alone, anywhere(n, height, width), background)
    raise ValueError(f"unknown kind {kind!r}; choose one of {', '.join(MASK_KINDS)}")


def random_label_map(
    kind: str, shape: tuple[int, int, int], num_labels: int, *, edges: bool = False, ignore: bool = False, seed: int = 0
) -> LabelMap:
    """`random_labels` as a LabelMap; `edges` adds a random boundary, `ignore` makes one pixel in eight no class."""
    labels = random_labels(kind, shape, num_labels, seed)
    generator = torch.Generator().manual_seed(seed + 1)

    def somewhere(part: float) -> Tensor:
        return (torch.rand(shape, generator=generator, device="cpu") < part).to(labels.device)

    plane = somewhere(0.2) if edges else None
    if ignore:
        labels = labels.masked_fill(somewhere(0.125), 255)
    return LabelMap(labels, num_labels, plane, ignore_index=255 if ignore else None)


def random_spade(config_text: str, norm_nc: int, label_nc: int, seed: int = 0) -> SPADE:
    """A layer whose running statistics are not the initial zeros and ones."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        layer = SPADE(config_text, norm_nc, label_nc)
        for name, buffer in layer.named_buffers():
            if name.endswith("running_mean"):
                buffer.normal_()
            elif name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return layer


def stock_spade(layer: SPADE, x: Tensor, planes: Tensor, negative_slope: float = 1.0) -> Tensor:
    """Computes the result of `layer` in plain PyTorch operators, without updating its running statistics.

    Args:
        planes: (N, label_nc, H, W) float, the dense condition.
    """
    norm = layer.param_free_norm
    if isinstance(norm, nn.InstanceNorm2d):
        normalized = F.instance_norm(x, eps=norm.eps)
    else:
        assert isinstance(norm, nn.BatchNorm2d)
        statistics = (None, None) if norm.training else (norm.running_mean, norm.running_var)
        normalized = F.batch_norm(x, *statistics, training=norm.training, eps=norm.eps)
    hidden = layer.mlp_shared(F.interpolate(planes, size=x.shape[2:], mode="nearest"))
    y = normalized * (1 + layer.mlp_gamma(hidden)) + layer.mlp_beta(hidden)
    return y if negative_slope == 1 else F.leaky_relu(y, negative_slope)


def forward_backward(run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    """Returns y = run(x) and, by name, the gradients of x and of module's parameters; `grad` is the gradient of y."""
    x = x.detach().clone().requires_grad_()
    module.zero_grad()
    y = run(x)
    y.backward(grad.to(y.dtype))
    found = {"y": y.detach(), "gradient of x": x.grad}
    found |= {f"gradient of {name}": p.grad for name, p in module.named_parameters()}
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise AssertionError(f"no {', no '.join(missing)}")
    return {name: value.clone() for name, value in found.items() if value is not None}


def relative_error(got: Tensor, exact: Tensor) -> float:
    """The largest difference, divided by the largest magnitude of `exact`; 0 if nothing differs."""
    if got.shape != exact.shape:
        raise AssertionError(f"shape {tuple(got.shape)}, not {tuple(exact.shape)}")
    difference = (got.double() - exact.double()).abs().max().item()
    return 0.0 if difference == 0 else (difference / exact.double().abs().max()).item()


def assert_within_budget(got: dict[str, Tensor], stock: dict[str, Tensor], exact: dict[str, Tensor]) -> None:
    """Asserts the package's promise of accuracy, for every tensor of `forward_backward`.

    A float64 result equals `exact` (float64) to 1e-12 relative. A result in another dtype has at most twice the error
    of the stock layer in that dtype, plus one rounding of the largest value.
    """
    assert got.keys() == stock.keys() == exact.keys()
    wrong = []
    for name, value in got.items():
        dtype = stock[name].dtype
        error = relative_error(value, exact[name])
        limit = (
            1e-12 if dtype == torch.float64 else 2 * relative_error(stock[name], exact[name]) + torch.finfo(dtype).eps
        )
        if not error <= limit:
            wrong.append(f"{name}: relative error {error:.2e} > {limit:.2e}")
    assert not wrong, "; ".join(wrong)
