"""The networks that are compared, which benchmarks call providers: this package's generator and stock versions of it.

A `Run` calls a network on a mask. It includes all work that depends on the mask: one-hot planes or window indexes.
"""

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
"""Providers in evaluation mode.

`stock.StockGenerator.become` describes eager, tuned and spade-free. "compiled" is tuned with torch.compile and frozen
weights, and spade-free-compiled is spade-free with them. "ours" is this package's generator; ours-dense evaluates every
pixel instead of the distinct windows. spade-free-packed is spade-free with the convolutions of ours: it takes
less time than ours by the cost of the SPADE layers."""

TRAINING = ("eager", "tuned", "compiled", "ours", "spade-free")
"""Providers in training mode."""

_COMPILED: dict[str, Variant] = {"compiled": "tuned", "spade-free-compiled": "spade-free"}


def settled_generator(mask: LabelMap, ngf: int = 64) -> SPADEGenerator:
    """Returns a generator for masks of this size, with random weights, and the batch statistics of one forward."""
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
    """Returns runs in evaluation mode, which map a mask to images (N, 3, H, W).

    "ours" runs `generator` itself, which this function freezes. Except in eager, spectral norm is folded into the
    weights here, and so is not timed.
    """
    # The stock networks are copied before the generator is frozen, because freezing may change its modules.
    generator.eval()
    runs = {name: _stock_run(generator, name) for name in names if not name.startswith("ours")}
    freeze(generator)
    ours: dict[str, Run] = {"ours": lambda mask: generator(fresh(mask))}
    ours["ours-dense"] = use_path("dense")(ours["ours"])
    return {name: _without_gradients(runs[name] if name in runs else ours[name]) for name in names}


def training_networks(generator: SPADEGenerator, names: Sequence[str]) -> dict[str, nn.Module]:
    """Returns networks in training mode, which take a mask; "ours" is `generator` itself."""
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
    """Returns a run that computes an image and the gradients of its mean square by all weights."""

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
    """Replaces the forward of all convolutions by that of this package's frozen convolutions; returns the network."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            packed = PackedConv2d(module.weight, module.bias, module.padding)  # type: ignore[arg-type]
            module.forward = packed.__call__  # type: ignore[method-assign, assignment]
    return network


def _compiled_run(stock: StockGenerator) -> Run:
    # The import takes a second, so it is not at the top. As an option of torch.compile, freezing has no effect.
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
