"""Installs, with and without a compiler."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]

# An editable install would lend its compiled module to the package under test.
USE_WITHOUT_KERNELS = """
import copy, sys, warnings
sys.meta_path[:] = [finder for finder in sys.meta_path if "__editable__" not in finder.__module__]
import torch, spade_kernels as sk
from spade_model import cli
assert not sk.build_info()["compiled"], sk.build_info()
layer = sk.SPADE("spadeinstance3x3", 4, 3)
x, segmap = torch.randn(1, 4, 8, 8), torch.randint(0, 3, (1, 16, 16))
warnings.simplefilter("always")
with warnings.catch_warnings(record=True) as none:
    copy.deepcopy(layer).to("meta")(x.to("meta"), torch.rand(1, 3, 16, 16, device="meta"))
    sk.use_backend("reference")
    layer(x, segmap)
    sk.use_backend("auto")
with warnings.catch_warnings(record=True) as one:
    layer(x, segmap).sum().backward()
    torch.compile(layer, backend="aot_eager", fullgraph=True)(x, sk.LabelMap(segmap, 3))
assert not none, none
assert [warning.category for warning in one] == [sk.MissingKernelsWarning], one
print(one[0].message)
try:
    sk.use_backend("cpu")
except RuntimeError as error:
    print(error)
cli.main(["doctor"])
print(sk.__file__)
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
    for name in ("spade_kernels/ops/modulate.py", "spade_kernels/py.typed", "spade_model/templates/page.html"):
        assert name in names
    top = {name.split("/")[0] for name in names}
    assert {t for t in top if not t.endswith(".dist-info")} == {"spade_kernels", "spade_model"}
    assert not any(name.endswith(".so") for name in names)


@pytest.mark.parametrize("so", [None, b"not a library"], ids=["not built", "does not load"])
def test_without_compiled_kernels_it_works_and_says_why(pure_wheel, tmp_path, so):
    zipfile.ZipFile(pure_wheel).extractall(tmp_path)
    reason = rf"spade_kernels._C is not built for {sys.implementation.cache_tag} \(SPADE_KERNELS_BUILD=none was set\); "
    if so is not None:
        (tmp_path / "spade_kernels" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_bytes(so)
        reason = r"spade_kernels._C is built but does not load \(.+\); "
    reason += r".*SPADE_KERNELS_BUILD=cpu pip install \."
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", USE_WITHOUT_KERNELS], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    for saying in ("CPU tensors take plain PyTorch, .*", "backend 'cpu' cannot run: ", "  cpu +cannot run: "):
        assert re.search(f"^{saying}{reason}$", done.stdout, re.MULTILINE), done.stdout
    assert str(tmp_path) in done.stdout, "the unpacked wheel was not what ran"


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SPADE_KERNELS_BUILD": "fpga"}, "'fpga' is not one of auto, cpu, none, cuda"),
        ({"SPADE_KERNELS_BUILD": "cpu", "PATH": "/nowhere"}, "there is no C\\+\\+ compiler; install g\\+\\+"),
        ({"SPADE_KERNELS_BUILD": "cpu", "CXX": "c--"}, "there is no c--; install g\\+\\+"),
        ({"SPADE_KERNELS_BUILD": "cpu", "CXX": "false"}, "false does not compile C\\+\\+20"),
        pytest.param(
            {"SPADE_KERNELS_BUILD": "cuda"},
            "SPADE_KERNELS_BUILD=cuda cannot build: the installed torch .* was built without CUDA",
            marks=pytest.mark.skipif(torch.version.cuda is not None, reason="this torch was built with CUDA"),
        ),
    ],
    ids=["unknown choice", "no compiler", "missing CXX", "old compiler", "no CUDA"],
)
def test_a_build_that_cannot_be_is_refused_in_one_line(variables, message):
    environment = {name: value for name, value in os.environ.items() if name != "CXX"} | variables
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], capture_output=True, text=True, cwd=ROOT, env=environment
    )
    assert done.returncode != 0
    assert re.fullmatch(f".*{message}.*", done.stderr.strip())


@pytest.mark.skipif(shutil.which("nm") is None, reason="there is no nm")
@pytest.mark.parametrize("name", ["_C", "_C_cuda"])
def test_compiled_modules_ask_torch_for_its_stable_abi_only(name):
    """So that a wheel loads on every torch from the oldest supported one on."""
    found = importlib.util.find_spec(f"spade_kernels.{name}")
    if found is None:
        pytest.skip(f"{name} is not built")
    listed = subprocess.run(["nm", "-D", "--undefined-only", found.origin], capture_output=True, text=True, check=True)
    symbols = [line.split()[-1] for line in listed.stdout.splitlines()]
    assert "torch_call_dispatcher" in symbols
    # C++ names of at::, c10::, caffe2:: and torch::, mangled; those of the stable ABI are C.
    assert not [s for s in symbols if re.match(r"_Z(T[IVS])?NK?(2at|3c10|6caffe2|5torch)", s)]


def test_import_loads_no_module_that_it_does_not_need():
    """The modules of `accelerate`, and those of torch.compile and Triton, are imported at first use."""
    program = """
import sys, torch
before = set(sys.modules)
import spade_kernels
found = {name for name in set(sys.modules) - before if name.startswith("spade_kernels.accelerate.")}
late = {"torch._dynamo", "torch._inductor", "triton", "statistics"}
print(*found, *late & (set(sys.modules) - before))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=True)
    assert not done.stdout.split()


@pytest.mark.parametrize(
    "first",
    [
        "import spade_kernels",
        "import spade_kernels.accelerate",
        "from spade_kernels import accelerate",
        "from spade_kernels.accelerate import Family",
        "from spade_kernels.accelerate import *",
        "import spade_kernels.accelerate.layer",
        "import spade_kernels.accelerate.replace",
    ],
)
def test_accelerate_is_a_function_in_every_order_of_imports(first):
    program = f"""
{first}
import spade_kernels as sk, sys
model = sk.restore(sk.SPADE("spadebatch3x3", 4, 3))
assert not sk.accelerate(model).replaced
import spade_kernels.accelerate
from spade_kernels import accelerate
from spade_kernels.accelerate import FAMILIES, Family, Parts, Projection, Report, Unsupported, formulas
from spade_kernels.accelerate.layer import Family as same
package = sys.modules["spade_kernels.accelerate"]
assert sk.accelerate is accelerate is package.accelerate and type(accelerate) is type(sk.freeze)
assert Family is same and FAMILIES is package.FAMILIES and set(package.__all__) <= set(dir(package))
assert not hasattr(package, "speedup")
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
