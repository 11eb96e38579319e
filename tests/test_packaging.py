"""What is installed, with and without a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

USE_WITHOUT_COMPILER = """
import sys
# An editable install would lend its compiled module to the package under test.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
import torch, spade_kernels as sk
info = sk.build_info()
assert info["backend"] == "reference" and not info["compiled"], info
try:
    sk.use_backend("cpu")
except RuntimeError as error:
    assert "compiled module is not there" in str(error), error
else:
    raise AssertionError("a backend that is not there was chosen")
layer = sk.SPADE("spadeinstance3x3", 4, 3)
layer(torch.randn(1, 4, 8, 8), torch.randint(0, 3, (1, 16, 16))).sum().backward()
print("works", sk.__file__)
"""


@pytest.fixture(scope="module")
def pure_wheel(tmp_path_factory) -> Path:
    """The wheel of a machine without a compiler."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    # Built from a copy: setuptools leaves its build folder in the sources.
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder / "source")], check=True)
    environment = {**os.environ, "SPADE_KERNELS_BUILD": "none"}
    done = subprocess.run([*command, str(folder / "source")], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return next(folder.glob("*.whl"))


def test_wheel_holds_the_packages_and_nothing_else(pure_wheel):
    names = zipfile.ZipFile(pure_wheel).namelist()
    for name in ("spade_kernels/ops.py", "spade_kernels/py.typed", "spade_model/templates/page.html"):
        assert name in names
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"spade_kernels", "spade_model"}
    assert not any(name.endswith(".so") for name in names)


def test_works_without_compiled_kernels(pure_wheel, tmp_path):
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE_WITHOUT_COMPILER], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert str(tmp_path) in done.stdout, "the unpacked wheel was not what ran"


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ("fpga", "'fpga' is not one of auto, cpu, none, cuda"),
        pytest.param(
            "cuda",
            "SPADE_KERNELS_BUILD=cuda cannot build: the installed torch .* was built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA"),
        ),
    ],
)
def test_a_build_that_cannot_be_is_refused(choice, message):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, "SPADE_KERNELS_BUILD": choice},
    )
    assert done.returncode != 0
    assert re.search(message, done.stderr)
