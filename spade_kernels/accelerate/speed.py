"""How much faster an accelerated layer is."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels.accelerate.layer import AcceleratedLayer, restore_class
from spade_kernels.accelerate.probe import copied_module

_REPEATS = 5


def speedup(module: nn.Module) -> float:
    """Time of the layer's own forward over that of the accelerated one, on a CPU in evaluation, for 64 x 64 blobs."""
    assert isinstance(module, AcceleratedLayer)
    parts = module.parts()
    assert parts is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        ours = copied_module(module).cpu().float().eval()
        stock = copy.deepcopy(ours)
        restore_class(stock)
        x = torch.randn(1, parts.channels[0], 64, 64)
        args, kwargs = module._spade_family.example(module, x, *(_blobs(count) for count in parts.channels[1:]))
        times: dict[nn.Module, list[float]] = {stock: [], ours: []}
        for _ in range(_REPEATS):
            for layer, seconds in times.items():
                start = time.perf_counter()
                layer(*args, **kwargs)
                seconds.append(time.perf_counter() - start)
        # Without the first, in which memory is new and the label map is read.
        return median(times[stock][1:]) / median(times[ours][1:])


def _blobs(classes: int) -> Tensor:
    """One-hot planes (1, classes, 64, 64)."""
    labels = F.interpolate(torch.rand(1, classes, 16, 16), size=(64, 64), mode="bicubic").argmax(1)
    return F.one_hot(labels, classes).permute(0, 3, 1, 2).float()
