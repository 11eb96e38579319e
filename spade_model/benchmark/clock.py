"""The clock takes times on CPUs and GPUs; providers take turns, and on CUDA their calls are captured in graphs."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

PRECISIONS = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp16": torch.float16}
_WARM_UPS = 3
_CPU = torch.device("cpu")


@contextmanager
def settled(device: torch.device) -> Iterator[None]:
    """Within it, cuDNN chooses the fastest algorithms and CUDA's work runs on one stream, not the default one.

    Spectral norm keeps nodes of autograd from one step to the next, with the stream that they were made on. Were it
    another than the one a graph is captured on, the capture would break.
    """
    if device.type != "cuda":
        yield
        return
    torch.backends.cudnn.benchmark = True
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield
    torch.cuda.current_stream().wait_stream(stream)


class Captured:
    """Holds run() as one CUDA graph, within `settled`, after it has warmed up; run itself where there is no CUDA.

    Calling it gives what run() returned, at the same address every time.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device):
        # Compilers work in the first call.
        self._output = run()
        if device.type != "cuda":
            self._replay: Callable[[], Any] = run
            return
        for _ in range(_WARM_UPS):
            self._output = run()
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=torch.cuda.current_stream()):
            self._output = run()
        self._replay = self._replay_graph

    def __call__(self) -> Any:
        return self._replay()

    def _replay_graph(self) -> Any:
        self._graph.replay()
        return self._output


def milliseconds(run: Callable[[Any], object], argument: Any, device: torch.device = _CPU) -> float:
    """Returns the milliseconds of one call on an idle device, the host's work included."""
    if device.type != "cuda":
        started = time.perf_counter()
        run(argument)
        return (time.perf_counter() - started) * 1e3
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run(argument)
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleave(
    runs: Mapping[str, Callable[[Any], object]],
    arguments: Sequence[Any],
    rounds: int,
    device: torch.device = _CPU,
    seconds: float = math.inf,
) -> dict[str, list[float]]:
    """Returns the milliseconds of each provider, one value for every round; the providers must be warm.

    A round gives every provider one call with the same argument, and the next round takes the next argument. Every
    argument has its round, however long that takes. Once `seconds` are over, no round starts after the third.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    started = time.monotonic()
    for number in range(max(rounds, len(arguments))):
        if number >= max(3, len(arguments)) and time.monotonic() - started > seconds:
            break
        for name, run in runs.items():
            times[name].append(milliseconds(run, arguments[number % len(arguments)], device))
    return times


@contextmanager
def float32_products(precision: str) -> Iterator[None]:
    """Within it, float32 products and convolutions are as `precision` says.

    Args:
        precision: "tf32"; "ieee", without rounding; or "shipped", what PyTorch does when told nothing: convolutions in
            tf32, other products in float32. The other PRECISIONS are "shipped", too.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = precision == "tf32", precision != "ieee"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Returns the function compiled as the baseline is; without CUDA it is only traced."""
    # One function for many layers; beyond the usual limit of versions it would quietly run uncompiled.
    torch._dynamo.config.recompile_limit = 100
    if device.type != "cuda":
        return torch.compile(function, dynamic=False, backend="eager")
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
