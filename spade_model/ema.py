"""The exponential moving average (EMA) of a generator's weights."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from spade_kernels.condition import Segmap


class EMA:
    """Keeps a second generator with the moving average of the trained generator's parameters.

    Args:
        network: a fresh network of the same architecture; it becomes the average.
        source: the trained network. decay: fraction of the old average kept at each update.
    """

    def __init__(self, network: nn.Module, source: nn.Module, decay: float):
        self.network, self.decay = network.eval().requires_grad_(False), decay
        network.load_state_dict(source.state_dict())

    @torch.no_grad()
    def update(self, source: nn.Module) -> None:
        """Moves the parameters towards the source's; buffers (norm statistics, spectral vectors) are copied."""
        torch._foreach_lerp_(list(self.network.parameters()), list(source.parameters()), 1 - self.decay)
        for mine, theirs in zip(self.network.buffers(), source.buffers(), strict=True):
            mine.copy_(theirs)

    @torch.no_grad()
    def reestimate(self, segmaps: Iterable[Segmap]) -> None:
        """Re-estimates the batch-norm statistics of the averaged generator as their plain mean over the batches.

        Random style vectors are drawn from a fork of the random state, so training is not affected. If `segmaps`
        raises, the statistics stay as they were.
        """
        norms = [m for m in self.network.modules() if isinstance(m, nn.BatchNorm2d) and m.track_running_stats]
        if not norms:
            return
        momentum = norms[0].momentum
        before = [buffer.clone() for buffer in self.network.buffers()]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None
        self.network.train()
        try:
            with torch.random.fork_rng():
                for segmap in segmaps:
                    self.network(segmap)
        except BaseException:
            for buffer, value in zip(self.network.buffers(), before, strict=True):
                buffer.copy_(value)
            raise
        finally:
            self.network.eval()
            for norm in norms:
                norm.momentum = momentum
