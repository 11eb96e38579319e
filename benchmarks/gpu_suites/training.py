"""This suite measures the generator's forward and backward, and the memory that they take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_model.benchmark.clock import PRECISIONS, Captured, compiled, float32_products
from spade_model.benchmark.graphs import filled, our_runs, preparation, static_mask, variant
from spade_model.benchmark.memory import allocated, peak_on_device
from spade_model.benchmark.providers import Run, settled_generator
from spade_model.benchmark.results import GPU_PEAK, TRAINING, Result
from spade_model.benchmark.stock import StockGenerator, stock_generator
from spade_model.benchmark.verification import SLACK, check_gradients, check_images
from spade_model.benchmark.workload import Workload, place_for, release


def training(work: Workload, precision: str, batch: int, *, with_baseline: bool) -> Iterator[Result]:
    """Measures the generator's forward and backward, and the memory that they take."""
    with float32_products(precision):
        networks = Training(work, precision, batch)
        # At larger batches there is no memory for every network's activations.
        networks.add("ours", "spade-free", *(("tuned",) * (batch <= work.batch)))
        networks.add(*(("original",) * (batch == work.batch)))
        yield from networks.measured()
        if with_baseline:
            networks.drop("tuned", "original")
            networks.add("baseline")
            yield from networks.measured()


class Training:
    """Holds the networks in training mode, each captured with its backward for one batch size."""

    def __init__(self, work: Workload, precision: str, batch: int):
        self.work, self.precision, self.batch, self.dtype = work, precision, batch, PRECISIONS[precision]
        self.case = work.case(precision, batch)
        self.runs: dict[str, Run] = {}
        self.peaks: dict[str, float] = {}
        self.first: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
        found = work.batches(batch)
        self.before = allocated(work.device)
        with torch.device(work.device):
            self.ours = settled_generator(found[0], work.ngf).train()
        self._remember("ours", self.ours)
        self.prepare = preparation(self.ours, gradients=True)
        self.place, self.found = place_for(found, self.prepare)

    def add(self, *names: str) -> None:
        """Takes the peak memory of the networks of these names and captures them, ours first of all."""
        for name in names:
            with self.work.may_fail(name, self.case, self.runs):
                if name == "ours":
                    self._add_ours()
                else:
                    self._add_stock(name)
            if name not in self.runs and name != "ours":
                self.drop(name)

    def drop(self, *names: str) -> None:
        """Makes room for others."""
        for name in names:
            self.runs.pop(name, None)
            self.first.pop(name, None)
        release(self.work.device)

    def compile_ours(self) -> None:
        with self.work.may_fail("ours-compiled", self.case, self.runs):
            paint = compiled(self.ours.forward, self.work.device)
            step = self._step(self.ours, lambda: paint(self.place.label_map))
            self.runs["ours-compiled"] = self._our_runs(step)["ours"]

    def stock_step(self, name: str, static: LabelMap | None = None) -> Callable[[], Tensor]:
        """Builds the stock network of this name and returns a function that runs one forward and backward."""
        stock, mask = self._stock(name), static or static_mask(self.found[0])
        self._remember(name, stock)
        if name == "baseline":
            stock.paint = compiled(stock.paint, self.work.device)  # type: ignore[method-assign]
        if name == "original":
            return self._step(stock, lambda: stock.paint(stock.planes(mask, torch.float32)), "shipped")
        return self._step(stock, lambda: stock.paint(stock.planes(mask, self.dtype)))

    def measured(self) -> Iterator[Result]:
        """Yields the peaks, compares every image and takes the times."""
        if self.work.device.type == "cuda":
            yield from (Result.of(GPU_PEAK, self.case, name, [value], "MB") for name, value in self.peaks.items())
        may_fail = partial(self.work.may_fail, case=self.case, runs=self.runs)
        exact, tuned = self._from_the_start(self.exact), self._from_the_start(self.tuned)
        runs = {name: self._from_the_start(run) for name, run in self.runs.items()}
        check_images(runs, exact, tuned, self.found, SLACK[self.precision], may_fail)
        times = self.work.times(self.runs, self.found)
        yield from (Result.of(TRAINING, self.case, name, ms, batches=len(self.found)) for name, ms in times.items())

    @cached_property
    def exact(self) -> Run:
        return float32_products("ieee")(self._image("exact", "original", torch.float32))

    @cached_property
    def tuned(self) -> Run:
        return self._image("tuned image", "tuned", self.dtype)

    def _add_ours(self) -> None:
        step = self._step(self.ours, lambda: self.ours(self.place.label_map))
        self.peaks["ours"] = peak_on_device(step, self.before, self.work.device)
        self.runs |= self._our_runs(step)

    def _our_runs(self, step: Callable[[], Tensor]) -> dict[str, Run]:
        runs = our_runs(step, self.place, self.found, self.prepare)
        # The network's gradients are now those of this graph.
        runs["ours"](self.found[0])
        check_gradients(self.ours)
        return runs

    def _add_stock(self, name: str) -> None:
        before = allocated(self.work.device)
        static = static_mask(self.found[0])
        step = self.stock_step(name, static)
        self.peaks[name] = peak_on_device(step, before, self.work.device)
        self.runs[name] = filled(static, step if name == "original" else Captured(step, self.work.device))

    def _from_the_start(self, run: Run) -> Run:
        """Returns the run with the networks as they were: every forward pass moves the vectors of spectral norm on."""

        def with_first_state(mask: LabelMap) -> Tensor:
            for name in self.first:
                self._restore(name)
            return run(mask)

        return with_first_state

    def _remember(self, name: str, network: nn.Module) -> None:
        # Its parameters stand still.
        self.first[name] = network, {k: v.clone() for k, v in network.named_buffers()}

    @torch.no_grad()
    def _restore(self, name: str) -> None:
        network, first = self.first[name]
        for key, buffer in network.named_buffers():
            buffer.copy_(first[key])

    def _stock(self, name: str) -> StockGenerator:
        self._restore("ours")
        with torch.device(self.work.device):
            return stock_generator(self.ours, variant(name), training=True)

    def _image(self, key: str, name: str, dtype: torch.dtype) -> Run:
        """Returns a run of the stock network that keeps nothing for a backward."""
        stock, device = self._stock(name), self.work.device
        self._remember(key, stock)

        @torch.no_grad()
        def run(mask: LabelMap) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                return stock.paint(stock.planes(mask, dtype))

        return run

    def _step(
        self, network: nn.Module, forward: Callable[[], Tensor], products: str | None = None
    ) -> Callable[[], Tensor]:
        in_bf16, device = self.precision == "bf16" and products is None, self.work.device

        def step() -> Tensor:
            network.zero_grad(set_to_none=True)
            # A cast that autocast had kept from before would not be made anew in a replay.
            with torch.autocast(device.type, torch.bfloat16, enabled=in_bf16, cache_enabled=False):
                image = forward()
            image.float().square().mean().backward()
            return image.detach()

        return step if products is None else float32_products(products)(step)
