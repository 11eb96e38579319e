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

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gpu.batches import Workload, place_for
from gpu.clock import PRECISIONS, Captured, compiled, float32_products, take_turns
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
    with torch.no_grad(), float32_products("tf32" if precision == "tf32" else "shipped"):
        networks = _Eval(work, precision, batch)
        yield from networks.measured(work.main_masks)
        if with_baseline:
            networks.add_baseline()
            for kind in work.masks:
                yield from networks.measured(kind)


def training(work: Workload, precision: str, batch: int, *, with_baseline: bool) -> Iterator[Result]:
    """The generator's forward and backward, and the memory that they take."""
    with float32_products("tf32" if precision == "tf32" else "shipped"):
        networks = _Training(work, precision, batch)
        yield from networks.measured()
        if with_baseline:
            networks.add_stock("baseline")
            yield from networks.measured()


def both_compiled(work: Workload, precision: str, batch: int) -> Iterator[Result]:
    """`evaluation` and `training` of the main masks with ours compiled too, once everything is."""
    with torch.no_grad(), float32_products("tf32" if precision == "tf32" else "shipped"):
        evaluated = _Eval(work, precision, batch)
        evaluated.add_baseline()
        evaluated.compile_ours()
        yield from evaluated.measured(work.main_masks)
        del evaluated
    with float32_products("tf32" if precision == "tf32" else "shipped"):
        trained = _Training(work, precision, batch)
        trained.add_stock("baseline")
        trained.compile_ours()
        yield from trained.measured()


class _Eval:
    """The networks in eval mode, captured for one batch size."""

    def __init__(self, work: Workload, precision: str, batch: int):
        self.work, self.precision, self.batch, self.dtype = work, precision, batch, PRECISIONS[precision]
        self.example = work.batches(batch)[0]
        with torch.device(work.device):
            self.ours = settled_generator(self.example, work.ngf).eval()
            original = stock_generator(self.ours, "eager", training=False)
            names = ("baseline", "tuned", "spade-free")
            stocks = [stock_generator(self.ours, variant(name), training=False).to(self.dtype) for name in names]
        self.baseline, tuned, free = stocks
        freeze(self.ours.to(self.dtype))
        self.runs = {"tuned": self._captured(tuned), "spade-free": self._captured(free)}
        if batch == work.batch:
            self.runs["original"] = with_products("shipped", lambda mask: painted(original, mask, torch.float32))
        self.exact = with_products("ieee", lambda mask: painted(original, mask, torch.float32))
        self.paint: Callable[[LabelMap], Tensor] | None = None

    def add_baseline(self) -> None:
        self.baseline.paint = compiled(self.baseline.paint, self.work.device)  # type: ignore[method-assign]
        self.runs["baseline"] = self._captured(self.baseline)

    def compile_ours(self) -> None:
        self.paint = compiled(self.ours.forward, self.work.device)

    def measured(self, kind: str) -> Iterator[Result]:
        """Captures ours for masks of this kind, compares every output, takes the times."""
        prepare = preparation(self.ours, gradients=False)
        place, found = place_for(self.work.batches(self.batch, kind), prepare)
        runs = self.runs | our_runs(lambda: self.ours(place.label_map), place, found, prepare)
        if self.paint is not None:
            runs |= compiled_runs(lambda: self.paint(place.label_map), place, found, prepare)
        if kind == "noise":
            with use_path("dense"):
                dense = our_runs(lambda: self.ours(place.label_map), place, found, prepare)
            runs["ours-dense"] = dense["ours"]
        for mask in found:
            check_images(runs, self.exact, runs["tuned"], mask, SLACK[self.precision])
        times = take_turns(runs, found, self.work.device, self.work.turns, self.work.seconds)
        case = self.work.case(self.precision, self.batch, kind)
        yield from (Result.of(EVAL, case, name, values, batches=len(found)) for name, values in times.items())

    def _captured(self, stock: StockGenerator) -> Run:
        static = static_mask(self.example)
        return filled(static, Captured(lambda: painted(stock, static, self.dtype), self.work.device))


class _Training:
    """The networks in training mode, each captured with its backward for one batch size."""

    def __init__(self, work: Workload, precision: str, batch: int):
        self.work, self.precision, self.batch, self.dtype = work, precision, batch, PRECISIONS[precision]
        self.runs: dict[str, Run] = {}
        self.peaks: dict[str, float] = {}
        self.first: dict[str, tuple[nn.Module, dict[str, Tensor]]] = {}
        found = work.batches(batch)
        before = allocated(work.device)
        with torch.device(work.device):
            self.ours = settled_generator(found[0], work.ngf).train()
        self._remember("ours", self.ours)
        prepare = preparation(self.ours, gradients=True)
        self.place, self.found = place_for(found, prepare)
        step = self._step(self.ours, lambda: self.ours(self.place.label_map))
        self.peaks["ours"] = peak(step, before, work.device)
        self.runs |= our_runs(step, self.place, self.found, prepare)
        self.exact = with_products("ieee", self._image("exact", "original", torch.float32))
        self.tuned = self._image("tuned image", "tuned", self.dtype)
        # At larger batches there is no memory for every network's activations.
        for name in ("spade-free", *(("tuned",) * (batch <= work.batch)), *(("original",) * (batch == work.batch))):
            self.add_stock(name)

    def add_stock(self, name: str) -> None:
        """Builds the stock network of this name, takes its peak memory and captures it."""
        before = allocated(self.work.device)
        stock, static = self._stock(name), static_mask(self.found[0])
        self._remember(name, stock)
        if name == "baseline":
            stock.paint = compiled(stock.paint, self.work.device)  # type: ignore[method-assign]
        if name == "original":
            step = self._step(stock, lambda: painted(stock, static, torch.float32), "shipped")
        else:
            step = self._step(stock, lambda: painted(stock, static, self.dtype))
        self.peaks[name] = peak(step, before, self.work.device)
        self.runs[name] = filled(static, step if name == "original" else Captured(step, self.work.device))

    def compile_ours(self) -> None:
        paint = compiled(self.ours.forward, self.work.device)
        step = self._step(self.ours, lambda: paint(self.place.label_map))
        self.runs |= compiled_runs(step, self.place, self.found, preparation(self.ours, gradients=True))

    def measured(self) -> Iterator[Result]:
        """The peaks; then compares every image and takes the times."""
        case = self.work.case(self.precision, self.batch)
        if self.work.device.type == "cuda":
            yield from (Result.of(PEAK, case, name, [value], "MB") for name, value in self.peaks.items())
        runs = {name: self._from_the_start(run) for name, run in self.runs.items()}
        exact, tuned = self._from_the_start(self.exact), self._from_the_start(self.tuned)
        for mask in self.found:
            check_images(runs, exact, tuned, mask, SLACK[self.precision])
        check_gradients(self.ours)
        times = take_turns(self.runs, self.found, self.work.device, self.work.turns, self.work.seconds)
        notes = {"batches": len(self.found)}
        yield from (Result.of(TRAINING, case, name, values, **notes) for name, values in times.items())

    def _from_the_start(self, run: Run) -> Run:
        """The run with the networks as they were: every forward pass moves the vectors of spectral norm on."""

        def with_first_state(mask: LabelMap) -> Tensor:
            for network, state in self.first.values():
                network.load_state_dict(state)
            return run(mask)

        return with_first_state

    def _remember(self, name: str, network: nn.Module) -> None:
        # Not on the device, whose memory is measured.
        self.first[name] = network, {k: v.to("cpu", copy=True) for k, v in network.state_dict().items()}

    def _stock(self, name: str) -> StockGenerator:
        network, state = self.first["ours"]
        network.load_state_dict(state)
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


def compiled_runs(*arguments: Any) -> dict[str, Run]:
    """`our_runs` of a compiled network, with everything; none where the compiler fails."""
    try:
        return {"ours-compiled": our_runs(*arguments)["ours"]}
    except Exception:
        # What is measured without it is wanted all the same.
        traceback.print_exc()
        return {}


def with_products(precision: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The run with `float32_products` as told."""

    def wrapped(*arguments: LabelMap) -> Tensor:
        with float32_products(precision):
            return run(*arguments)

    return wrapped


def check_images(runs: dict[str, Run], exact: Run, tuned: Run, mask: LabelMap, slack: float) -> None:
    """Every network's distance from the exact image is at most twice the tuned one's.

    By norm: whole networks in bfloat16 have single pixels that are far off.

    Raises:
        AssertionError: one is not; nothing is timed.
    """
    expected = exact(mask).double()
    limit = 2 * _distance(tuned(mask), expected) + slack
    errors = {name: _distance(run(mask), expected) for name, run in runs.items() if name != "spade-free"}
    wrong = {name: error for name, error in errors.items() if not error <= limit}
    assert not wrong, f"images are further than {limit:.2g} from float32's, nothing is timed: {wrong}"


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
