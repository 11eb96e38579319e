"""How much faster an accelerated layer is."""

from __future__ import annotations

import copy
import time
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

from spade_kernels.accelerate.layer import AcceleratedLayer, restore_class

_REPEATS = 5


def speedup(module: nn.Module) -> float:
    """Time of the layer's own forward over that of the accelerated one, on a CPU in evaluation, for 64 x 64 blobs."""
    assert isinstance(module, AcceleratedLayer)
    parts = module.parts()
    assert parts is not None
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.device("cpu"):
        ours = copy.deepcopy(module).cpu().float().eval()
        stock = copy.deepcopy(ours)
        restore_class(stock)
        x = torch.randn(1, parts.channels[0], 64, 64)
        coarse = torch.rand(1, parts.channels[1], 16, 16)
        labels = F.interpolate(coarse, size=(64, 64), mode="bicubic").argmax(1)
        planes = F.one_hot(labels, parts.channels[1]).permute(0, 3, 1, 2).float()
        args, kwargs = module._spade_family.example(module, x, planes)
        times: dict[nn.Module, list[float]] = {stock: [], ours: []}
        for _ in range(_REPEATS):
            for layer, seconds in times.items():
                start = time.perf_counter()
                layer(*args, **kwargs)
                seconds.append(time.perf_counter() - start)
        # Without the first, in which memory is new and the label map is read.
        return median(times[stock][1:]) / median(times[ours][1:])
