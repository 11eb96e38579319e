"""Every GPU kernel, compiled for GPUs that need not be here: nothing spilled, wide loads, tensor cores."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils.cpp_extension import include_paths

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "compiled.json"
TARGETS = {"sm_80", "sm_90", "sm_100"}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}  # bytes that one block can have
REGISTERS = {"_gather_gemm": 255}  # which hold a tile of the table
REGISTERS_OTHERWISE = 128
# Kernels that read large tensors: each has a variant for aligned channels.
WIDE_LOADS = {
    "triton": {"_part_stats", "_stats_grad", "_gather_sum", "_gather_gemm", "_sum_pieces", "_modulate", "_input_grad"}
    | {"_table_grad_pieces", "_table_grad_of_pixels"},
    "cuda": {"PieceStats", "Gradient", "Forward", "InputGrad", "SumPieces"},
}


def compiled(what: str, tmp_path: Path) -> list[dict]:
    file = tmp_path / "compiled.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "compiled.py"), "--only", what, "--out", str(file)]
    # Interpreted kernels cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    content = json.loads(file.read_text())
    if what in content["not run"]:
        pytest.skip(f"{what} kernels: {content['not run'][what]}")
    return content["kernels"]


def label(kernel: dict) -> tuple[str, ...]:
    return tuple(kernel[key] for key in ("source", "name", "variant", "target"))


def faults(kernel: dict) -> Iterator[str]:
    who = f"{kernel['target']} {kernel['name']}({kernel['variant']})"
    if kernel["stack"]:
        yield f"{who}: spills to {kernel['stack']} bytes of stack"
    if kernel["registers"] > (most := REGISTERS.get(kernel["name"], REGISTERS_OTHERWISE)):
        yield f"{who}: {kernel['registers']} registers, more than {most}"
    if kernel["shared"] > (most := SHARED[kernel["target"]]):
        yield f"{who}: {kernel['shared']} bytes of shared memory, more than {most}"
    if kernel["name"] == "_gather_gemm" and "ieee" not in kernel["variant"] and not kernel["tensor_core"]:
        yield f"{who}: no tensor cores"


def without_wide_loads(kernels: list[dict]) -> set[tuple[str, str, str]]:
    """Kernel, dtype and target."""
    most: dict[tuple[str, str, str], int] = defaultdict(int)
    for kernel in kernels:
        key = kernel["name"], re.split("[ ,]", kernel["variant"])[0], kernel["target"]
        most[key] = max(most[key], kernel["wide_loads"])
    return {key for key, loads in most.items() if not loads}


def triton_kernels() -> set[str]:
    """Names of jitted functions that no other one calls."""
    text = "".join(path.read_text() for path in (ROOT / "spade_kernels" / "triton").glob("*.py"))
    names = re.findall(r"@triton\.jit(?:\(.*\))?\ndef (\w+)", text)
    return {name for name in names if not re.search(rf"(?<!def )\b{name}\(", text)}


def cuda_sources() -> set[str]:
    return {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}


@pytest.mark.parametrize("what", ["triton", "cuda"])
def test_compiled_kernels(what, tmp_path):
    kernels = compiled(what, tmp_path)
    assert not [fault for kernel in kernels for fault in faults(kernel)]
    assert not {key for key in without_wide_loads(kernels) if key[0] in WIDE_LOADS[what]}
    names = {kernel["name"] for kernel in kernels}
    assert names >= WIDE_LOADS[what]
    if what == "triton":
        assert names == triton_kernels()
    else:
        assert {Path(kernel["source"]).name for kernel in kernels} == cuda_sources()
    # The figures in the repository are of these kernels.
    recorded = json.loads(RESULTS.read_text())["kernels"]
    of_kind = [kernel for kernel in recorded if kernel["source"].endswith(".cu") == (what == "cuda")]
    assert {label(kernel) for kernel in kernels} == {label(kernel) for kernel in of_kind}
    targets = defaultdict(set)
    for kernel in kernels:
        targets[kernel["source"], kernel["name"], kernel["variant"]].add(kernel["target"])
    assert all(found == TARGETS for found in targets.values())


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH")
@pytest.mark.parametrize("source", ["arguments.cpp", *(f"cuda/{name}" for name in sorted(cuda_sources()))])
def test_operators_compile_for_cuda(source):
    """With the real launch: elsewhere a stand-in for it is compiled."""
    flags = ["-std=c++20", "-Xcompiler=-fsyntax-only", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    include = [f"-I{path}" for path in include_paths()]
    command = [
        "nvcc",
        "-c",
        *flags,
        *include,
        "--expt-relaxed-constexpr",
        str(ROOT / "csrc" / source),
        "-o",
        os.devnull,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_layers_up_to_the_launch():
    """The variants that Triton's launcher compiles for real layers' arguments are those that `variants` predicts."""
    pytest.importorskip("triton.compiler", reason="Triton is not installed")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("triton_launches.py"))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert set(json.loads(done.stdout)) == triton_kernels()
