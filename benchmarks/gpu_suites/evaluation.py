"""This suite measures the generator in eval mode, from labels to image."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from spade_kernels import LabelMap, freeze
from spade_kernels.functional import use_path
from spade_model.benchmark.clock import PRECISIONS, Captured, compiled, float32_products
from spade_model.benchmark.graphs import filled, our_runs, preparation, static_mask, variant
from spade_model.benchmark.providers import Run, settled_generator
from spade_model.benchmark.results import EVAL, Result
from spade_model.benchmark.stock import stock_generator
from spade_model.benchmark.verification import SLACK, check_images
from spade_model.benchmark.workload import Workload, place_for


def evaluation(work: Workload, precision: str, batch: int, *, with_baseline: bool) -> Iterator[Result]:
    """Measures the generator in eval mode; with the baseline, on other masks than the main ones, too."""
    with torch.no_grad(), float32_products(precision):
        networks = Evaluation(work, precision, batch)
        networks.add("tuned", "spade-free")
        if batch == work.batch:
            networks.runs["original"] = networks.original
        yield from networks.measured(work.main_masks)
        if with_baseline:
            networks.add("baseline")
            for kind in work.masks:
                yield from networks.measured(kind)


class Evaluation:
    """Holds the networks in eval mode, captured for one batch size."""

    def __init__(self, work: Workload, precision: str, batch: int):
        self.work, self.precision, self.batch, self.dtype = work, precision, batch, PRECISIONS[precision]
        self.example = work.batches(batch)[0]
        with torch.device(work.device):
            self.ours = settled_generator(self.example, work.ngf).eval()
            original = stock_generator(self.ours, "eager", training=False)
            names = ("baseline", "tuned", "spade-free")
            self.stocks = {
                name: stock_generator(self.ours, variant(name), training=False).to(self.dtype) for name in names
            }
        freeze(self.ours.to(self.dtype))
        self.runs: dict[str, Run] = {}
        self.original = float32_products("shipped")(lambda mask: original.paint(original.planes(mask, torch.float32)))
        self.exact = float32_products("ieee")(lambda mask: original.paint(original.planes(mask, torch.float32)))
        tuned = self.stocks["tuned"]
        self.tuned: Run = lambda mask: tuned.paint(tuned.planes(mask, self.dtype))
        self.paint: Callable[[LabelMap], Tensor] | None = None

    def add(self, *names: str) -> None:
        """Captures the stock networks of these names."""
        for name in names:
            with self.work.may_fail(name, self.work.case(self.precision, self.batch), self.runs):
                static = static_mask(self.example)
                self.runs[name] = filled(static, Captured(self.stock_step(name, static), self.work.device))

    def stock_step(self, name: str, static: LabelMap | None = None) -> Callable[[], Tensor]:
        """Returns a function that generates one batch."""
        stock, mask = self.stocks[name], static or static_mask(self.example)
        if name == "baseline":
            stock.paint = compiled(stock.paint, self.work.device)  # type: ignore[method-assign]
        return lambda: stock.paint(stock.planes(mask, self.dtype))

    def compile_ours(self) -> None:
        self.paint = compiled(self.ours.forward, self.work.device)

    def measured(self, kind: str) -> Iterator[Result]:
        """Captures ours for masks of this kind, compares every output and takes the times."""
        prepare = preparation(self.ours, gradients=False)
        place, found = place_for(self.work.batches(self.batch, kind), prepare)
        case = self.work.case(self.precision, self.batch, kind)
        runs = dict(self.runs)
        may_fail = partial(self.work.may_fail, case=case, runs=runs)
        with may_fail("ours"):
            runs |= our_runs(lambda: self.ours(place.label_map), place, found, prepare)
        if (paint := self.paint) is not None:
            with may_fail("ours-compiled"):
                runs["ours-compiled"] = our_runs(lambda: paint(place.label_map), place, found, prepare)["ours"]
        if kind == "noise":
            with may_fail("ours-dense"), use_path("dense"):
                runs["ours-dense"] = our_runs(lambda: self.ours(place.label_map), place, found, prepare)["ours"]
        check_images(runs, self.exact, self.tuned, found, SLACK[self.precision], may_fail)
        times = self.work.times(runs, found)
        yield from (Result.of(EVAL, case, name, values, batches=len(found)) for name, values in times.items())
