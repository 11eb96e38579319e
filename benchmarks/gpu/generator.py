"""Whole generators from labels to image, and to gradients: ours against the honest baseline.

"baseline" is channels-last, with one convolution for gamma and beta, compiled with mode="max-autotune-no-cudagraphs",
in one CUDA graph with the making of its one-hot planes ("max-autotune" would capture the compiled part alone); in eval
its spectral norm is folded. "tuned" is the same without the compiler, "spade-free" is that without its SPADE layers.
"ours" makes its label map and the window indexes in every call and replays a graph; for "ours-indexed" they were made
ahead, as loader workers do; "ours-replay" is the graph alone; "ours-compiled" is "ours" compiled like the baseline.
"original" is as shipped: eager, float32, NCHW.

Precision: in eval, "bf16" has the weights themselves in bfloat16; in training it is autocast over float32 weights.
"tf32" are float32 tensors whose products round their factors to tf32. The same holds on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from gpu.batches import Workload, place_for, release
from gpu.clock import PRECISIONS, Captured, compiled, float32_products, interleave
from spade_kernels import LabelMap, StaticLabelMap, freeze
from spade_kernels.functional import use_path
from spade_model.benchmark.masks import fresh
from spade_model.benchmark.providers import settled_generator
from spade_model.benchmark.results import EVAL, TRAINING, Result
from spade_model.benchmark.stock import StockGenerator, Variant, one_hot, stock_generator
from spade_model.networks import SPADEGenerator

PEAK = "peak memory, generator forward + backward"
SLACK = {"bf16": 2e-3, "tf32": 1e-3}
"""How much more than twice the tuned network's error is allowed: where that happens to be very small."""

Run = Callable[[LabelMap], Tensor]


def evaluation(work: Workload, precision: str, batch: int, *, with_baseline: bool) -> Iterator[Result]:
    """The generator in eval mode; with the baseline, other masks than the main ones, too."""
    with torch.no_grad(), products_of(precision):
        networks = _Eval(work, precision, batch)
        networks.add("tuned", "spade-free", *(("original",) if batch == work.batch else ()))
        yield from networks.measured(work.main_masks)
        if with_baseline:
            networks.add("baseline")
            for kind in work.masks:
                yield from networks.measured(kind)


def training(work: Workload, precision: str, batch: int, *, with_baseline: bool) -> Iterator[Result]:
    """The generator's forward and backward, and the memory that they take."""
    with products_of(precision):
        networks = _Training(work, precision, batch)
        # At larger batches there is no memory for every network's activations.
        networks.add("ours", "spade-free", *(("tuned",) * (batch <= work.batch)))
        networks.add(*(("original",) * (batch == work.batch)))
        yield from networks.measured()
        if with_baseline:
            networks.drop("tuned", "original")
            networks.add("baseline")
            yield from networks.measured()


def both_compiled(work: Workload, precision: str, batch: int) -> Iterator[Result]:
    """`evaluation` and `training` of the main masks with ours compiled too, once everything is."""
    with torch.no_grad(), products_of(precision):
        evaluated = _Eval(work, precision, batch)
        evaluated.add("baseline")
        evaluated.compile_ours()
        yield from evaluated.measured(work.main_masks)
        del evaluated
    release(work.device)
    with products_of(precision):
        trained = _Training(work, precision, batch)
        trained.add("ours", "baseline")
        trained.compile_ours()
        yield from trained.measured()


def compilation(work: Workload, precision: str, batch: int, *, gradients: bool) -> Iterator[Result]:
    """Nothing but the baseline's first call, after which the compiler has it in its caches."""
    with torch.set_grad_enabled(gradients), products_of(precision):
        (_Training if gradients else _Eval)(work, precision, batch).stock_step("baseline")()
    yield from ()


def products_of(precision: str) -> AbstractContextManager[None]:
    """`float32_products` for a network in this precision."""
    return float32_products("tf32" if precision == "tf32" else "shipped")


class _Eval:
    """The networks in eval mode, captured for one batch size."""

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
        self.original = with_products("shipped", lambda mask: painted(original, mask, torch.float32))
        self.exact = with_products("ieee", lambda mask: painted(original, mask, torch.float32))
        tuned = self.stocks["tuned"]
        self.tuned: Run = lambda mask: painted(tuned, mask, self.dtype)
        self.paint: Callable[[LabelMap], Tensor] | None = None

    def add(self, *names: str) -> None:
        """Captures the stock networks of these names; "original" is eager."""
        for name in names:
            with self.work.may_fail(name, self.work.case(self.precision, self.batch), self.runs):
                static = static_mask(self.example)
                step = self.stock_step(name, static)
                self.runs[name] = self.original if name == "original" else filled(static, self._captured(step))

    def stock_step(self, name: str, static: LabelMap | None = None) -> Callable[[], Tensor]:
        """Returns a function that generates one batch."""
        mask = static or static_mask(self.example)
        if name == "original":
            return lambda: self.original(mask)
        stock = self.stocks[name]
        if name == "baseline":
            stock.paint = compiled(stock.paint, self.work.device)  # type: ignore[method-assign]
        return lambda: painted(stock, mask, self.dtype)

    def compile_ours(self) -> None:
        self.paint = compiled(self.ours.forward, self.work.device)

    def measured(self, kind: str) -> Iterator[Result]:
        """Captures ours for masks of this kind, compares every output, takes the times."""
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
        times = interleave(runs, found, self.work.device, self.work.repeats, self.work.seconds)
        yield from (Result.of(EVAL, case, name, values, batches=len(found)) for name, values in times.items())

    def _captured(self, step: Callable[[], Tensor]) -> Captured:
        return Captured(step, self.work.device)


class _Training:
    """The networks in training mode, each captured with its backward for one batch size."""

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
        """One forward and backward of the stock network of this name, which is built for it."""
        stock, mask = self._stock(name), static or static_mask(self.found[0])
        self._remember(name, stock)
        if name == "baseline":
            stock.paint = compiled(stock.paint, self.work.device)  # type: ignore[method-assign]
        if name == "original":
            return self._step(stock, lambda: painted(stock, mask, torch.float32), "shipped")
        return self._step(stock, lambda: painted(stock, mask, self.dtype))

    def measured(self) -> Iterator[Result]:
        """The peaks; then compares every image and takes the times."""
        if self.work.device.type == "cuda":
            yield from (Result.of(PEAK, self.case, name, [value], "MB") for name, value in self.peaks.items())
        may_fail = partial(self.work.may_fail, case=self.case, runs=self.runs)
        exact, tuned = self._from_the_start(self.exact), self._from_the_start(self.tuned)
        runs = {name: self._from_the_start(run) for name, run in self.runs.items()}
        check_images(runs, exact, tuned, self.found, SLACK[self.precision], may_fail)
        times = interleave(self.runs, self.found, self.work.device, self.work.repeats, self.work.seconds)
        notes = {"batches": len(self.found)}
        yield from (Result.of(TRAINING, self.case, name, values, **notes) for name, values in times.items())

    @cached_property
    def exact(self) -> Run:
        return with_products("ieee", self._image("exact", "original", torch.float32))

    @cached_property
    def tuned(self) -> Run:
        return self._image("tuned image", "tuned", self.dtype)

    def _add_ours(self) -> None:
        step = self._step(self.ours, lambda: self.ours(self.place.label_map))
        self.peaks["ours"] = peak(step, self.before, self.work.device)
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
        self.peaks[name] = peak(step, before, self.work.device)
        self.runs[name] = filled(static, step if name == "original" else Captured(step, self.work.device))

    def _from_the_start(self, run: Run) -> Run:
        """The run with the networks as they were: every forward pass moves the vectors of spectral norm on."""

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
        """The stock network's image, with nothing kept for a backward."""
        stock, device = self._stock(name), self.work.device
        self._remember(key, stock)

        @torch.no_grad()
        def run(mask: LabelMap) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False):
                return painted(stock, mask, dtype)

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

        return step if products is None else with_products(products, step)


def variant(name: str) -> Variant:
    variants: dict[str, Variant] = {"original": "eager", "spade-free": "spade-free"}
    return variants.get(name, "tuned")


def painted(stock: StockGenerator, mask: LabelMap, dtype: torch.dtype) -> Tensor:
    """`stock(mask)`, from planes of this dtype."""
    size = None if stock.needs_whole_mask else stock.start_size
    return stock.paint(one_hot(mask, size, dtype, stock.memory_format))


def static_mask(example: LabelMap) -> LabelMap:
    """A copy for `filled`; the stock networks read its labels and edges alone."""
    edges = None if example.edges is None else example.edges.clone()
    return LabelMap(example.labels.clone(), example.num_labels, edges)


def filled(static: LabelMap, run: Callable[[], Tensor]) -> Run:
    def with_mask(mask: LabelMap) -> Tensor:
        static.labels.copy_(mask.labels)
        if static.edges is not None and mask.edges is not None:
            static.edges.copy_(mask.edges)
        return run()

    return with_mask


def preparation(generator: SPADEGenerator, gradients: bool) -> Callable[[LabelMap], LabelMap]:
    """Builds all indexes that the generator asks a label map for."""

    def prepare(mask: LabelMap) -> LabelMap:
        return mask.prepare(generator.resolutions(), gradients=gradients)

    return prepare


def our_runs(
    run: Callable[[], Tensor],
    place: StaticLabelMap,
    found: Sequence[LabelMap],
    prepare: Callable[[LabelMap], LabelMap],
) -> dict[str, Run]:
    """Ours with everything, with indexes made ahead, and the graph alone (of the mask filled in last).

    Args:
        run: reads `place.label_map`.
    """
    graph = Captured(run, place.label_map.device)
    indexed = {id(mask): prepare(fresh(mask)) for mask in found}

    def whole(mask: LabelMap) -> Tensor:
        place.copy_(fresh(mask))
        return graph()

    def ahead(mask: LabelMap) -> Tensor:
        place.copy_(indexed[id(mask)])
        return graph()

    return {"ours": whole, "ours-indexed": ahead, "ours-replay": lambda mask: graph()}


def with_products(precision: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The run with `float32_products` as told."""

    def wrapped(*arguments: LabelMap) -> Tensor:
        with float32_products(precision):
            return run(*arguments)

    return wrapped


def check_images(
    runs: dict[str, Run],
    exact: Run,
    tuned: Run,
    found: Sequence[LabelMap],
    slack: float,
    may_fail: Callable[[str], AbstractContextManager[None]],
) -> None:
    """Every network's distance from the exact image is at most twice the tuned one's, or it may not be timed.

    By norm: whole networks in bfloat16 have single pixels that are far off.
    """
    failed = set()
    for mask in found:
        expected = exact(mask).double()
        limit = 2 * _distance(tuned(mask), expected) + slack
        for name in [name for name in runs if name not in failed]:
            failed.add(name)
            with may_fail(name):
                error = _distance(runs[name](mask), expected)
                assert name == "spade-free" or error <= limit, f"{error:.2g} from the exact image, over {limit:.2g}"
                failed.remove(name)


def check_gradients(network: nn.Module) -> None:
    """Raises AssertionError for a gradient that is missing or not finite."""
    wrong = [
        name
        for name, parameter in network.named_parameters()
        if parameter.grad is None or not parameter.grad.isfinite().all()
    ]
    assert not wrong, f"no gradient, or one that is not finite: {wrong}"


def _distance(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


def allocated(device: torch.device) -> int:
    """Bytes."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak(step: Callable[[], Tensor], before: int, device: torch.device) -> float:
    """MB (1e6 bytes) above `before`, where the network was not there yet; 0 where there is no CUDA."""
    step()
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
