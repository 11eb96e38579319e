"""Whole training steps for benchmarks, with generator, discriminator and both optimizers, without the VGG loss."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor, nn

import spade_kernels as sk
from spade_kernels import LabelMap
from spade_model import trainer
from spade_model.benchmark.masks import fresh
from spade_model.benchmark.stock import StockGenerator
from spade_model.config import DataConfig, ModelConfig, TrainConfig
from spade_model.data import Batch
from spade_model.networks.generator import start_size

STEPS = ("eager", "ours-reference", "ours")
"""Providers of training steps: the eager stock generator, and this package's, first without compiled kernels.

All of them have this package's discriminator."""


def step_run(provider: str, mask: LabelMap, ngf: int) -> Callable[[LabelMap], Tensor]:
    """Returns a run that trains one step on its mask and a random photograph, and returns the generated image.

    The discriminator has the width `ngf` too.
    """
    height, width = mask.shape[1:]
    data = DataConfig(
        label_nc=mask.num_labels,
        contain_dontcare_label=False,
        no_instance=mask.edges is None,
        crop_size=width,
        aspect_ratio=width / height,
    )
    config = TrainConfig(data=data, model=ModelConfig(ngf=ngf, ndf=ngf), no_vgg_loss=True)
    torch.manual_seed(0)
    with mock.patch.object(trainer, "build_generator", _stock) if provider == "eager" else contextlib.nullcontext():
        built = trainer.Trainer(config)
    photograph = torch.rand(1, 3, height, width) * 2 - 1

    def run(mask: LabelMap) -> Tensor:
        with _backend("reference" if provider == "ours-reference" else "auto"):
            return built.step([Batch(fresh(mask), photograph, ["mask"])])[1]

    return run


def _stock(data: DataConfig, model: ModelConfig) -> nn.Module:
    return StockGenerator(data.semantic_nc, model.ngf, start_size("normal", data.crop_size, data.aspect_ratio))


@contextlib.contextmanager
def _backend(name: str):
    sk.use_backend(name)
    try:
        yield
    finally:
        sk.use_backend("auto")
