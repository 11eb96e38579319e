"""Shared fixtures. Golden vectors and real masks live beside the checkout; tests that need them skip without."""

from __future__ import annotations

import os
import sys
from importlib import import_module

# Before the package is imported: on a GPU, too, the tests compare the values of indices with what they index.
os.environ.setdefault("SPADE_KERNELS_CHECK_INDICES", "1")
# Read when torch is imported: the two test processes share their cores with each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command import TINY, Result

import spade_kernels as sk

# For the suites in benchmarks/. Last, so that a package under test that is not the checkout's comes first.
sys.path.append(str(Path(__file__).parents[1]))

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


# Small tensors: a second thread costs more than it brings, and two test processes share two cores better this way.
torch.set_num_threads(1)


ON_GPU = ["triton", "cuda"] if torch.cuda.is_available() else []


@pytest.fixture(scope="module", params=["reference", "cpu", *ON_GPU])
def backend(request):
    """Runs a test on the plain PyTorch kernels, on the compiled ones, and where there is a GPU on those for it.

    Tests make their tensors on the default device, which is the one the kernels are for.
    """
    reason = sk.build_info()["backends"][request.param]
    if reason is not None:
        pytest.skip(f"backend {request.param}: {reason}")
    sk.use_backend(request.param)
    if request.param in ON_GPU:
        torch.set_default_device("cuda")
    # Stock convolutions are what results are compared with: on a GPU they would round, and differ from run to run.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        yield request.param
    torch.set_default_device(None)
    sk.use_backend("auto")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def trained_run(tmp_path_factory) -> Path:
    """The folder of a finished toy run of two steps. Tests that change it take a copy."""
    from spade_model.cli import main  # not above: the kernels' tests run without what spade_model needs

    folder = tmp_path_factory.mktemp("trained")
    assert main(["train", *TINY, "--checkpoints_dir", str(folder), "--name", "run"]) == 0
    return folder / "run"


@pytest.fixture
def spade(capsys) -> Callable[..., Result]:
    """The command line in this process: `spade("train", "--lr", "-1")`."""

    from spade_model.cli import main

    def run(*arguments: object) -> Result:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Result(status, captured.out, captured.err)

    return run


@pytest.fixture
def kernels_for_any_work(monkeypatch):
    """Makes accelerated layers run the kernels even in calls for which their original forward is faster."""
    monkeypatch.setattr(import_module("spade_kernels.accelerate.replace"), "_LEAST_WORK", 0)
