"""Training takes memory, on the CPU and on a GPU, for tensors saved for backward and at the peak of a step."""

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

    Counted: each storage once, at its full size, that is saved in a stock SPADE layer, or, in ours, anywhere in a
    residual block but in its plain convolutions (ours folds the activation, and may fold more, into the layer).
    Not counted: parameters and buffers. Copies derived from them are.
    """
    counted = [module for module in generator.modules() if isinstance(module, StockSPADE | SPADEResnetBlock)]
    left_out = [
        convolution for block in counted for name, convolution in block.named_children() if name in _PLAIN_CONVOLUTIONS
    ]
    owned = {t.untyped_storage().data_ptr() for t in (*generator.parameters(), *generator.buffers())}
    # Kept, or an address could be used a second time.
    kept: dict[int, torch.UntypedStorage] = {}
    with _inside(counted, left_out) as inside:

        def pack(saved: Tensor) -> Tensor:
            storage = saved.untyped_storage()
            if inside() and storage.data_ptr() not in owned:
                kept[storage.data_ptr()] = storage
            # Detached: a saved output would hold the node that holds it, and no graph would ever be freed.
            return saved.detach()

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            generator(mask)
    return sum(storage.nbytes() for storage in kept.values()) / _MB


def peak_of_step(provider: str, mask: LabelMap, ngf: int) -> float | None:
    """Returns the MB (1e6 bytes) by which the first training step of a fresh process raises its resident memory.

    With gradients and the optimizers' state. None where the system cannot tell (it takes Linux's /proc).
    """
    edges = None if mask.edges is None else mask.edges.numpy()
    arguments = provider, mask.labels.numpy(), mask.num_labels, edges, ngf, torch.get_num_threads()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_peak, *arguments).result()


def _peak(provider: str, labels, num_labels: int, edges, ngf: int, threads: int) -> float | None:
    # Not at the top: a trainer needs packages that measuring on a GPU does without.
    from spade_model.benchmark.training import step_run

    torch.set_num_threads(threads)
    mask = LabelMap(torch.from_numpy(labels), num_labels, None if edges is None else torch.from_numpy(edges))
    run = step_run(provider, mask, ngf)
    process = Path("/proc/self")
    try:
        # Makes the present size the peak so far; what building the networks took is forgotten.
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
    """Returns the bytes that tensors on the device take; 0 where there is no CUDA."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def peak_on_device(step: Callable[[], Tensor], before: int, device: torch.device) -> float:
    """Returns a step's peak in MB (1e6 bytes) above `before`, the bytes before its network; without CUDA 0."""
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
    """A function that says whether the forward running now is of a counted module and of none left out."""
    running: list[bool] = []
    handles = []
    for modules, counts in ((counted, True), (left_out, False)):
        for module in modules:
            # First, so that what spectral norm's own hook saves belongs to its convolution.
            handles.append(module.register_forward_pre_hook(lambda *_, c=counts: running.append(c), prepend=True))
            handles.append(module.register_forward_hook(lambda *_: _pop(running)))
    try:
        yield lambda: bool(running) and running[-1]
    finally:
        for handle in handles:
            handle.remove()


def _pop(running: list[bool]) -> None:
    running.pop()
