"""The generator run in several ways. A run takes a mask and does all from its labels to the image, or to gradients."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from spade_kernels import LabelMap, freeze
from spade_kernels.convolution import PackedConv2d
from spade_kernels.functional import use_path
from spade_model.benchmark.masks import fresh
from spade_model.benchmark.stock import StockGenerator, Variant, stock_generator
from spade_model.networks import SPADEGenerator, initialize

Run = Callable[[LabelMap], Tensor]

EVAL = ("eager", "tuned", "compiled", "ours", "ours-dense", "spade-free", "spade-free-compiled", "spade-free-packed")
"""`stock.StockGenerator.become` has eager, tuned and spade-free; -compiled is torch.compile with frozen weights, and
"compiled" that of tuned; ours-dense is ours without distinct windows; spade-free-packed has our convolutions, so that
what is left between it and ours are SPADE layers."""

TRAINING = ("eager", "tuned", "compiled", "ours", "spade-free")

_COMPILED: dict[str, Variant] = {"compiled": "tuned", "spade-free-compiled": "spade-free"}


def settled_generator(mask: LabelMap, ngf: int = 64) -> SPADEGenerator:
    """A generator for masks of this size, with random weights and running statistics that fit its activations."""
    torch.manual_seed(0)
    height, width = mask.shape[1:]
    generator = SPADEGenerator(mask.channels, ngf=ngf, crop_size=width, aspect_ratio=width / height)
    initialize(generator, "xavier", 1.0)
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        generator.train()(mask)
    for norm in norms:
        norm.momentum = 0.1
    return generator


def eval_runs(generator: SPADEGenerator, names: Sequence[str]) -> dict[str, Run]:
    """mask -> (N, 3, H, W), in evaluation mode. `generator` is what "ours" runs: it is frozen here.

    Weights stand still in every run: folding them (all but eager) is not part of the time.
    """
    # Copied before ours is frozen: freezing may change the modules.
    generator.eval()
    runs = {name: _stock_run(generator, name) for name in names if not name.startswith("ours")}
    freeze(generator)
    ours: dict[str, Run] = {"ours": lambda mask: generator(fresh(mask))}
    ours["ours-dense"] = use_path("dense")(ours["ours"])
    return {name: _without_gradients(runs[name] if name in runs else ours[name]) for name in names}


def training_networks(generator: SPADEGenerator, names: Sequence[str]) -> dict[str, nn.Module]:
    """Networks in training mode that take a mask; "ours" is `generator` itself."""
    generator.train()
    networks: dict[str, nn.Module] = {}
    for name in names:
        if name == "ours":
            networks[name] = generator
            continue
        stock = stock_generator(generator, _COMPILED.get(name, cast(Variant, name)), training=True)
        if name in _COMPILED:
            stock.paint = torch.compile(stock.paint, dynamic=False)  # type: ignore[method-assign]
        networks[name] = stock
    return networks


def training_run(network: nn.Module) -> Run:
    """mask -> image, after the gradients of all weights for the mean square of the image."""

    def run(mask: LabelMap) -> Tensor:
        network.zero_grad(set_to_none=True)
        image = network(mask if isinstance(network, StockGenerator) else fresh(mask))
        image.square().mean().backward()
        return image.detach()

    return run


def _stock_run(generator: SPADEGenerator, name: str) -> Run:
    if name == "spade-free-packed":
        return _packed(stock_generator(generator, "spade-free", training=False))
    stock = stock_generator(generator, _COMPILED.get(name, cast(Variant, name)), training=False)
    return _compiled_run(stock) if name in _COMPILED else stock


def _packed(network: nn.Module) -> nn.Module:
    """The network with its convolutions as ours are when frozen."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            packed = PackedConv2d(module.weight, module.bias, module.padding)  # type: ignore[arg-type]
            module.forward = packed.__call__  # type: ignore[method-assign, assignment]
    return network


def _compiled_run(stock: StockGenerator) -> Run:
    # Not above: it takes a second. And not as an option of torch.compile, which would quietly not freeze.
    from torch._inductor import config as inductor_config

    stock.paint = torch.compile(stock.paint, dynamic=False)  # type: ignore[method-assign]

    def run(mask: LabelMap) -> Tensor:
        with inductor_config.patch(freezing=True):
            return stock(mask)

    return run


def _without_gradients(run: Run) -> Run:
    def wrapped(mask: LabelMap) -> Tensor:
        with torch.no_grad():
            return run(mask)

    return wrapped
