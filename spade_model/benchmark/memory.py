"""Measures the memory of training: the tensors saved for the backward, and the peak of a step, on CPUs and GPUs."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_model.benchmark.stock import StockSPADE
from spade_model.networks.generator import SPADEResnetBlock

_MB = 1e6
_PLAIN_CONVOLUTIONS = ("conv_0", "conv_1", "conv_s")


def saved_by_spade(generator: nn.Module, mask: LabelMap) -> float:
    """Returns the MB (1e6 bytes) that autograd keeps for the backward of SPADE layers after a forward pass.

    Every saved storage counts once, at its full size. In a stock network, the storages saved within SPADE layers
    count. In this package's network, all storages saved within residual blocks count, except those of the plain
    convolutions: here a SPADE layer includes the activation that follows. Parameters and buffers do not count, but
    tensors computed from them do.
    """
    counted = [module for module in generator.modules() if isinstance(module, StockSPADE | SPADEResnetBlock)]
    left_out = [
        convolution for block in counted for name, convolution in block.named_children() if name in _PLAIN_CONVOLUTIONS
    ]
    owned = {t.untyped_storage().data_ptr() for t in (*generator.parameters(), *generator.buffers())}
    # The storages are kept alive, because another storage could otherwise get the address of a freed one.
    kept: dict[int, torch.UntypedStorage] = {}
    with _inside(counted, left_out) as inside:

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if inside() and storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage
            # A saved output that is not detached refers to its node, which refers to the output: a leak.
            return saved.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            generator(mask)
    return sum(storage.nbytes() for storage in kept.values()) / _MB


def peak_of_step(provider: str, mask: LabelMap, ngf: int) -> float | None:
    """Returns the MB (1e6 bytes) by which a training step, the first of a new process, raises its resident memory.

    This includes gradients and the state of the optimizers. The measurement needs /proc; without it None is returned.
    """
    edges = None if mask.edges is None else mask.edges.numpy()
    arguments = provider, mask.labels.numpy(), mask.num_labels, edges, ngf, torch.get_num_threads()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, *arguments).result()


def _peak(provider: str, labels, num_labels: int, edges, ngf: int, threads: int) -> float | None:
    # This is not imported at the top, because GPU benchmarks also run without the packages that a trainer needs.
    from spade_model.benchmark.training import step_run

    torch.set_num_threads(threads)
    mask = LabelMap(torch.from_numpy(labels), num_labels, None if edges is None else torch.from_numpy(edges))
    run = step_run(provider, mask, ngf)
    process = Path("/proc/self")
    try:
        # This resets the peak to the present size, so that building the networks does not count.
        (process / "clear_refs").write_text("5")
        before = _kilobytes(process, "VmRSS")
        run(mask)
        return (_kilobytes(process, "VmHWM") - before) * 1024 / _MB
    except OSError:
        return None


def _kilobytes(process: Path, name: str) -> int:
    lines = (process / "status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name + ":"))


def allocated(device: torch.device) -> int:
    """Returns the bytes that PyTorch's tensors occupy on a CUDA device; 0 for the CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_on_device(step: Callable[[], Tensor], before: int, device: torch.device) -> float:
    """Returns the peak memory of a step on a CUDA device in MB (1e6 bytes), less `before` bytes; on the CPU, 0.

    The step is run once before, to warm up.
    """
    step()
    if device.type != "cuda":
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / _MB


@contextmanager
def _inside(counted: Sequence[nn.Module], left_out: Sequence[nn.Module]) -> Iterator[Callable[[], bool]]:
    """Yields a function that returns True if the innermost of the modules that are running is a counted one."""
    running: list[bool] = []
    handles = []
    for modules, counts in ((counted, True), (left_out, False)):
        for module in modules:
            # This hook runs first, so that tensors saved by spectral norm's hook belong to its convolution.
            handles.append(module.register_forward_pre_hook(lambda *_, c=counts: running.append(c), prepend=True))
            handles.append(module.register_forward_hook(lambda *_: _pop(running)))
    try:
        yield lambda: bool(running) and running[-1]
    finally:
        for handle in handles:
            handle.remove()


def _pop(running: list[bool]) -> None:
    running.pop()
