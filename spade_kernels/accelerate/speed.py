"""Measures the speed-up of accelerated layers."""

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
    """Returns the time of a layer's original forward divided by that of the accelerated one.

    Both run on the CPU in eval mode, with a random mask of 64 x 64 pixels.
    """
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
        # The first call is left out: it allocates memory and reads the label map.
        return median(times[stock][1:]) / median(times[ours][1:])


def _blobs(classes: int) -> Tensor:
    """Returns the one-hot planes (1, classes, 64, 64) of a random mask with areas of many pixels."""
    labels = F.interpolate(torch.rand(1, classes, 16, 16), size=(64, 64), mode="bicubic").argmax(1)
    return F.one_hot(labels, classes).permute(0, 3, 1, 2).float()
