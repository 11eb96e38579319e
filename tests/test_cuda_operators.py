"""The CUDA operators without a GPU: the tests of operators and layers, with them in the CPU operators' place.

What `test_cuda_host` shows of the kernels, this shows of the functions that call them: checks, layouts, allocation.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_cuda_host import HERE, compiled
from test_operator_fuzz import fuzz

import spade_kernels as sk

TESTS = ("test_ops.py", "test_window_index.py", "test_layers.py", "test_static.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return compiled("operators", tmp_path_factory.mktemp("host"))


def test_calls_with_one_argument_changed(library):
    assert "300 calls: " in fuzz("--calls", 300, "--library", library)


def test_operators_and_layers(library):
    kinds = "cpu" if sk.build_info()["backends"]["cpu"] is None else "reference"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "cuda_host_plugin", "-p", "no:xdist", "-k", kinds]
    path = os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, *(str(HERE / name) for name in TESTS)],
        capture_output=True,
        text=True,
        cwd=Path(HERE).parent,
        env={**os.environ, "SPADE_CUDA_HOST": str(library), "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stdout
    launches = re.search(r"launches of CUDA kernels: (\d+)", done.stdout)
    assert launches, done.stdout
    assert int(launches[1]) > 10_000
