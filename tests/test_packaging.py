"""What is installed, with and without a compiler."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

USE_WITHOUT_KERNELS = """
import sys, warnings
# An editable install would lend its compiled module to the package under test.
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
import torch, spade_kernels as sk
info = sk.build_info()
assert info["backend"] == "reference" and not info["compiled"], info
try:
    sk.use_backend("cpu")
except RuntimeError as error:
    print(error)
else:
    raise AssertionError("a backend that is not there was chosen")
layer = sk.SPADE("spadeinstance3x3", 4, 3)

def use():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(1, 4, 8, 8), torch.randint(0, 3, (1, 16, 16))).sum().backward()
    return [str(w.message) for w in caught if w.category is RuntimeWarning]

if "chosen" in sys.argv:
    sk.use_backend("reference")
print("warnings:", use(), use())
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


def use(wheel: Path, folder: Path, *arguments: str) -> str:
    """What a process prints that uses the unpacked wheel."""
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    zipfile.ZipFile(wheel).extractall(folder)
    done = subprocess.run(
        [sys.executable, "-c", USE_WITHOUT_KERNELS, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr
    assert str(folder) in done.stdout, "the unpacked wheel was not what ran"
    return done.stdout


def test_without_compiled_kernels_it_says_so_once(pure_wheel, tmp_path):
    printed = use(pure_wheel, tmp_path)
    reason = "the compiled module is not there: SPADE_KERNELS_BUILD=none was set when this was installed"
    assert f"backend 'cpu' cannot run: {reason}" in printed
    assert re.search(
        rf"warnings: \[['\"]SPADE layers run in plain PyTorch.*{reason}.*pip install.*['\"]\] \[\]", printed
    )


def test_who_has_chosen_plain_pytorch_is_not_warned(pure_wheel, tmp_path):
    assert "warnings: [] []" in use(pure_wheel, tmp_path, "chosen")


def test_a_module_that_does_not_load_is_not_taken_for_missing(pure_wheel, tmp_path):
    module = tmp_path / "spade_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    module.parent.mkdir()
    module.write_bytes(b"no shared library")
    printed = use(pure_wheel, tmp_path)
    assert f"the compiled module {module} does not load ({module}: " in printed
    assert "warnings: ['SPADE layers run in plain PyTorch" in printed or 'warnings: ["SPADE' in printed


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
    done = setup(SPADE_KERNELS_BUILD=choice)
    assert done.returncode != 0
    assert re.search(message, done.stderr)


def setup(**environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "setup.py", "--version"]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "CXX": "", **environment}
    )


OLD_COMPILER = """#!/bin/sh
echo "error: unrecognized command-line option '-std=c++20'" >&2
exit 1
"""


@pytest.mark.parametrize("compiler", ["none", "misspelt", "old"])
def test_without_a_compiler_the_build_says_so_in_one_line(compiler, tmp_path):
    environment, reason = {
        "none": ({"PATH": str(tmp_path)}, "there was no C++ compiler; install one, such as g++"),
        "misspelt": ({"CXX": "g+++"}, "there was no compiler 'g+++', which CXX names; install one, such as g++"),
        "old": (
            {"CXX": str(tmp_path / "c++")},
            f"the compiler {tmp_path / 'c++'} cannot compile C++20; install a newer one, such as g++ 11",
        ),
    }[compiler]
    if compiler == "old":
        (tmp_path / "c++").write_text(OLD_COMPILER)
        (tmp_path / "c++").chmod(0o755)
    done = setup(SPADE_KERNELS_BUILD="cpu", **environment)
    assert done.returncode != 0
    assert done.stderr == f"SPADE_KERNELS_BUILD=cpu cannot build: {reason}\n"
    assert setup(SPADE_KERNELS_BUILD="auto", **environment).returncode == 0
