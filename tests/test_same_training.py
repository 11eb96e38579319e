"""Fifty training steps on toy landscapes, with the compiled kernels and with the reference: the same losses.

Adam with beta1 = 0 moves a weight by its gradient's sign, also where rounding decides that. Two runs of the reference
whose first weights differ by one rounding are 10 % apart after ten steps in float32, and after forty in float64; so are
the kernels and the reference. Hence float32 is compared step by step from one state, and whole runs are in float64 at a
tenth of the learning rate, where rounding stays below what the losses show.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import pytest
import torch

import spade_kernels as sk
from spade_model.config import ModelConfig, TrainConfig, default_data_config
from spade_model.data import Batch, create_dataset
from spade_model.data.sample import collate
from spade_model.trainer import Trainer

pytestmark = pytest.mark.skipif(sk.build_info()["backends"]["cpu"] is not None, reason="no compiled kernels")

STEPS, BATCHES = 50, 10
DATA = dataclasses.replace(default_data_config("toy"), crop_size=32, load_size=32, max_dataset_size=2 * BATCHES)
Losses = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _restored_backend():
    yield
    sk.use_backend("auto")


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    dataset = create_dataset(DATA, "train")
    return [collate([dataset[i], dataset[i + 1]], DATA.num_labels) for i in range(0, 2 * BATCHES, 2)]


def trainer(dtype: torch.dtype, **options) -> Trainer:
    torch.manual_seed(0)
    made = Trainer(TrainConfig(data=DATA, model=ModelConfig(ngf=4, ndf=4), no_vgg_loss=True, **options))
    made.generator.to(dtype)
    made.discriminator.to(dtype)
    return made


def step(trainer: Trainer, backend: str, batch: Batch) -> Losses:
    sk.use_backend(backend)
    dtype = next(trainer.generator.parameters()).dtype
    assert batch.image is not None
    # A slice starts without indexes: each backend builds its own.
    report, _ = trainer.step([Batch(batch.segmap[:], batch.image.to(dtype), batch.names)])
    return report


def assert_same_losses(got: Losses, expected: Losses, number: int, limit: float) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        # The hinge loss of the generator passes through zero.
        torch.testing.assert_close(got[name], value, rtol=limit, atol=1e-3 * limit, msg=f"{name} of step {number}")


def test_every_float32_step(batches: Sequence[Batch]):
    ours = trainer(torch.float32)
    for number in range(STEPS):
        batch, before = batches[number % BATCHES], copy.deepcopy(ours.state_dict())
        expected = step(ours, "reference", batch)
        ours.load_state_dict(before, "the state before the step")
        assert_same_losses(step(ours, "cpu", batch), expected, number, 1e-3)


def test_a_whole_float64_run(batches: Sequence[Batch]):
    ours, reference = (trainer(torch.float64, lr=2e-5) for _ in range(2))
    for number in range(STEPS):
        batch = batches[number % BATCHES]
        expected = step(reference, "reference", batch)
        assert_same_losses(step(ours, "cpu", batch), expected, number, 1e-6)
