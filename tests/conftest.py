"""Shared fixtures. Golden vectors and real masks live beside the checkout; tests that need them skip without."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

SHARED = Path(os.environ.get("SPADE_SHARED", Path(__file__).parents[2] / "shared"))


@pytest.fixture(scope="session")
def parity_dir() -> Path:
    folder = SHARED / "parity"
    if not folder.is_dir():
        pytest.skip(f"golden vectors of the original implementation are not here ({folder})")
    return folder


@pytest.fixture(scope="session")
def coco_dir() -> Path:
    folder = SHARED / "data" / "coco_stuff"
    if not folder.is_dir():
        pytest.skip(f"the real COCO-Stuff masks are not here ({folder})")
    return folder


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
