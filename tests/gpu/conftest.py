"""Tests that need a GPU. The operators' and layers' own tests run there too, on the backends triton and cuda."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gpu_masks import CLASSES, SIZE

import spade_kernels as sk
from spade_model.networks import SPADEGenerator


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason="not run: there is no GPU"))


@pytest.fixture(autouse=True, params=["triton", "cuda"])
def kernels(request):
    """The backend whose kernels run, where there are two; tensors are made on the GPU."""
    reason = sk.build_info()["backends"][request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    sk.use_backend(request.param)
    torch.set_default_device("cuda")
    # Stock convolutions are what results are compared with, so they are exact and the same in every run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param
    torch.set_default_device(None)
    sk.use_backend("auto")


@pytest.fixture
def generator() -> SPADEGenerator:
    torch.manual_seed(0)
    return SPADEGenerator(CLASSES + 1, ngf=8, crop_size=SIZE)
