"""These suites measure every operator on every backend at the shapes of the generator's layers.

The table of `spade_kernels/backends.py` follows from them. Beside the rates of kernels stand those of the device's own
copy and matrix product.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

import spade_kernels as sk
from spade_kernels import backends, ops
from spade_kernels.functional import use_path
from spade_kernels.testing import random_spade, relative_error
from spade_model.benchmark import results
from spade_model.benchmark.calls import Calls, Recorder, copies_beyond_cache, moved, rotated
from spade_model.benchmark.clock import PRECISIONS, Captured, float32_products
from spade_model.benchmark.masks import fresh
from spade_model.benchmark.results import Result
from spade_model.benchmark.shapes import layer_shapes, resolutions
from spade_model.benchmark.workload import Workload, place_for

LIMIT = {"bf16": 2e-2, "fp16": 5e-3, "tf32": 5e-3}
"""Largest difference of an output from the reference's, over its largest value."""

_COPIED, _PRODUCT = 1 << 29, 8192  # bytes that a copy reads, rows of a square matrix
_BOUND_BY_MEMORY = ("channel_stats", "modulate", "modulate_table_grad", "modulate_input_grad")

Shape = tuple[int, int, int]


def recorded(mask: sk.LabelMap, shape: Shape, dtype: torch.dtype) -> Calls:
    """Returns the operators' calls in one layer's forward and backward, without arguments that they do not read."""
    channels, side, upsample = shape
    device = mask.device
    layer = random_spade("spadesyncbatch3x3", channels, mask.channels).to(device).train()
    generator = torch.Generator(device).manual_seed(1)
    size = len(mask), channels, side // upsample, side // upsample
    x = torch.randn(size, generator=generator, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with Recorder() as recorder, use_path("windows"):
        y = layer(x, mask, negative_slope=0.2, upsample=upsample)
        y.backward(torch.randn(y.shape, generator=generator, device=device, dtype=dtype))
        mean, m2 = ops.channel_stats(x)
        (mean.square().sum() + m2.sum()).backward()
    calls = recorder.first_calls()
    func, arguments = calls["modulate"]
    calls["modulate"] = func, (*arguments[:5], None, None, None, *arguments[8:])
    return {name: (func, _detached(arguments)) for name, (func, arguments) in calls.items() if name != "window_index"}


@dataclass
class _Timed:
    """Holds one operator at one shape: by backend, what calls it `copies` times with `nbytes` to move each time."""

    copies: int
    nbytes: int
    runs: dict[str, Callable[[None], object]] = field(default_factory=dict)


def agreement(work: Workload, precision: str) -> Iterator[Result]:
    """Compares every operator on every backend with the reference, as `operators` does, which also takes times."""
    with float32_products(precision):
        for shape, _, calls in _calls(work, precision):
            for _ in _verified(calls, shape, precision, work):
                pass
    yield from ()


def operators(work: Workload, precision: str) -> Iterator[Result]:
    """Measures times by shape and over all 18 layers, and rates where memory or products bound an operator."""
    sums: dict[tuple[str, str], list[list[float]]] = defaultdict(list)
    with float32_products(precision):
        ceilings = _ceilings(work, precision)
        for shape, count, calls in _calls(work, precision):
            timed: dict[str, _Timed] = {}
            for backend, name, outputs in _verified(calls, shape, precision, work):
                if backend != "reference" and work.device.type != "cuda":
                    # Without graphs there is one backend in use while times are taken.
                    continue
                func, arguments = calls[name]
                if name not in timed:
                    nbytes = moved(arguments, outputs)
                    timed[name] = _Timed(copies_beyond_cache(nbytes, work.device), nbytes)
                with work.may_fail(backend, _case(work, precision, name, shape), timed[name].runs):
                    each = rotated(arguments, timed[name].copies)
                    timed[name].runs[backend] = _many(func, each, backend, work.device)
            for name, one in timed.items():
                case = _case(work, precision, name, shape)
                times = work.times(one.runs, [None], part=0.05)
                for backend, values in times.items():
                    values = [value / one.copies for value in values]
                    sums[name, backend].append([count * value for value in values])
                    yield Result.of(results.OPERATOR, case, backend, values, layers=count, MB=one.nbytes / 1e6)
                    yield from _rates(name, case, backend, values, one.nbytes, calls[name][1])
                yield from _ceiling_of(name, case, ceilings)
    for (name, backend), every in sums.items():
        if len(every) == len(layer_shapes(work.ngf, work.size[1])):
            values = [sum(repeat) for repeat in zip(*every, strict=False)]
            yield Result.of(results.OPERATOR, _case(work, precision, name, None), backend, values)


def window_index(work: Workload) -> Iterator[Result]:
    """Measures the making of label maps and their indexes at all resolutions, on labels that are on the device."""
    found = work.batches()
    case, expected = work.case("integers"), []
    names = dict.fromkeys(name for name in backends_on(work.device) if name != "triton")
    for name in list(names)[::-1]:
        # The reference, last of all, first.
        with work.may_fail(name, case, names):
            sk.use_backend(name)
            mask = fresh(found[0]).prepare(resolutions(found[0]), gradients=False)
            got = [t for size in resolutions(mask) for part in mask.window_index(size, 3) for t in _tensors(part)]
            expected = expected or got
            assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), "the window indexes differ"
    how: dict[str, Callable[[sk.LabelMap], object]] = {
        results.GPU_INDEX: lambda mask: mask.prepare(resolutions(mask), gradients=False),
        results.INDEX_GROUPS: lambda mask: mask.prepare(resolutions(mask), gradients=True),
        results.LABEL_MAP: fresh,
    }
    for suite, run in how.items():
        for name in names:
            sk.use_backend(name)
            # A label map keeps its indexes: each call takes one that was made before.
            unused = [fresh(found[0]) for _ in range(work.repeats + 3)]
            runs = {name: lambda _, unused=unused, run=run: run(unused.pop())}
            times = work.times(runs, [None])
            yield Result.of(suite, case, name, times[name])
    sk.use_backend("auto")


def _calls(work: Workload, precision: str) -> Iterator[tuple[Shape, int, Calls]]:
    found = work.batches()[:1]
    place, _ = place_for(found, lambda mask: mask.prepare(resolutions(mask)))
    for shape, count in layer_shapes(work.ngf, work.size[1]).items():
        sk.use_backend("auto")
        yield shape, count, recorded(place.label_map, shape, PRECISIONS[precision])
    sk.use_backend("auto")


def backends_on(device: torch.device) -> list[str]:
    """Returns the backends that have kernels for the device and run here, the reference last."""
    there = backends.build_info()["backends"]
    names = ("cuda", "triton") if device.type == "cuda" else ("cpu",)
    return [*(name for name in names if there[name] is None), "reference"]  # type: ignore[index]


def _verified(calls: Calls, shape: Shape, precision: str, work: Workload) -> Iterator[tuple[str, str, object]]:
    """Yields (backend, operator, outputs) of every call that agrees with the reference, with the backend in use."""
    sk.use_backend("reference")
    expected = {name: _run(func, arguments) for name, (func, arguments) in calls.items()}
    for backend in backends_on(work.device):
        sk.use_backend(backend)
        own = backends.kernels_on(work.device.type)
        for name, (func, arguments) in calls.items():
            if own[name] != backend:
                continue
            agreed: list[object] = []
            with work.may_fail(backend, _case(work, precision, name, shape), {}):
                outputs = _run(func, arguments)
                both = zip(tree_leaves(outputs), tree_leaves(expected[name]), strict=True)
                errors = [relative_error(got, exact) for got, exact in both]
                assert all(error <= LIMIT[precision] for error in errors), f"errors {errors}"
                agreed.append(outputs)
            for outputs in agreed:
                yield backend, name, outputs


def _run(func: Callable[..., Any], arguments: tuple) -> Any:
    with torch.no_grad():
        return func(*arguments)


def _many(func: Callable[..., Any], each: list[tuple], backend: str, device: torch.device) -> Callable[[None], object]:
    """Returns a call with each of the arguments, in one graph except for the reference, which reads sizes back."""

    def run() -> None:
        for arguments in each:
            _run(func, arguments)

    if backend != "reference":
        captured = Captured(run, device)
        return lambda _: captured()
    return lambda _: run()


def _rates(
    name: str, case: str, backend: str, milliseconds: list[float], nbytes: int, arguments: tuple
) -> Iterator[Result]:
    if name in _BOUND_BY_MEMORY:
        yield Result.of(results.BANDWIDTH, case, backend, [nbytes / 1e6 / ms for ms in milliseconds], "GB/s")
    if name == "modulation_table":
        gamma, windows = arguments[1], arguments[4]
        flops = 4 * windows.numel() * gamma.shape[0] * gamma.shape[1]
        yield Result.of(results.PRODUCTS, case, backend, [flops / 1e9 / ms for ms in milliseconds], "TFLOP/s")


def _ceiling_of(name: str, case: str, ceilings: dict[str, list[float]]) -> Iterator[Result]:
    """Yields the device's own limits, beside which operators are reported."""
    if name in _BOUND_BY_MEMORY:
        yield Result.of(results.BANDWIDTH, case, "copy", ceilings["copy"], "GB/s")
    if name == "modulation_table":
        yield Result.of(results.PRODUCTS, case, "matmul", ceilings["matmul"], "TFLOP/s")


def _ceilings(work: Workload, precision: str) -> dict[str, list[float]]:
    """Returns GB/s of a large copy, counting what it reads and writes; TFLOP/s of a large matrix product."""
    device = work.device
    nbytes, rows = (_COPIED, _PRODUCT) if device.type == "cuda" else (1 << 20, 256)
    source = torch.randint(256, (nbytes,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    left, right = torch.randn(2, rows, rows, device=device, dtype=PRECISIONS[precision])
    runs = {"copy": lambda _: target.copy_(source), "matmul": lambda _: left @ right}
    times = work.times(runs, [None])
    return {
        "copy": [2 * nbytes / 1e6 / ms for ms in times["copy"]],
        "matmul": [2 * rows**3 / 1e9 / ms for ms in times["matmul"]],
    }


def _case(work: Workload, precision: str, name: str, shape: Shape | None) -> str:
    if shape is None:
        return work.case(precision, what=f"{name}, {results.ALL_LAYERS}")
    channels, side, upsample = shape
    doubled = ", doubled" if upsample == 2 else ""
    return work.case(precision, what=f"{name}, {channels} x {side} x {side}{doubled}")


def _tensors(windows: Any) -> tuple[Tensor, ...]:
    return windows.windows, windows.pixel_row, windows.image_offsets


def _detached(arguments: tuple) -> tuple:
    return tuple(value.detach() if isinstance(value, Tensor) else value for value in arguments)
