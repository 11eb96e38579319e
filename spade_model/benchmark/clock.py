"""Times functions on CPUs and GPUs. All functions of a comparison run in turn; on CUDA they can run as CUDA graphs."""

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
    """Within this context, cuDNN uses its fastest algorithms, and CUDA work runs on one stream other than the default.

    Spectral norm keeps autograd nodes, and with them their stream, from one step to the next. A CUDA graph that is
    captured on another stream would fail.
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
    """A function captured as a CUDA graph; on the CPU, the function itself.

    A call replays the graph and returns the function's output, which has the same address in every call. Create it
    within `settled`. The function is called a few times before the capture, to warm up.
    """

    def __init__(self, run: Callable[[], Any], device: torch.device):
        # The first call can take long, because torch.compile compiles in it.
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
    """Returns the milliseconds that one call takes on an idle device, including the work of the host."""
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
    """Times functions in turn and returns the milliseconds of each function, one value per round.

    In each round, every function is called once with the same argument; the next round uses the next argument. There
    are at least as many rounds as arguments. The functions must be warmed up.

    Args:
        rounds: number of rounds, if it exceeds the number of arguments.
        seconds: after this time no new round starts, unless fewer than three rounds, or fewer rounds than arguments,
            are done.
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
    """Within this context, float32 matrix products and convolutions on CUDA have the given precision.

    Args:
        precision: "tf32" for TF32 in both; "ieee" for full float32 in both. Any other value selects PyTorch's defaults:
            TF32 in convolutions, full float32 in matrix products.
    """
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32, cudnn.allow_tf32 = precision == "tf32", precision != "ieee"
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def compiled(function: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """Returns the function compiled with autotuning, for baselines. For the CPU, it is traced but not compiled."""
    # One function serves many layers. Beyond the default limit of recompilations it would run uncompiled, silently.
    torch._dynamo.config.recompile_limit = 100
    if device.type != "cuda":
        return torch.compile(function, dynamic=False, backend="eager")
    return torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
