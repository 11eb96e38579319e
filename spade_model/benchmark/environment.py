"""Describes the machine, the software and the date of a measurement."""

from __future__ import annotations

import datetime
import hashlib
import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

import spade_kernels as sk

_ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")
_QUERIED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
# An installed package can lie inside an unrelated git repository, so git must not search the parent folders.
_CHECKOUT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Returns CPU, threads, instruction set, versions, commit (None outside a checkout), date and allocator."""
    return {
        "device": cpu_name(),
        "threads": torch.get_num_threads(),
        "isa": torch.backends.cpu.get_cpu_capability(),
        "backend": sk.build_info()["backend"],
        "torch": torch.__version__,
        "python": platform.python_version(),
        "spade_kernels": sk.__version__,
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "allocator": allocator(),
    }


def cpu_name() -> str:
    """Returns the processor's model, such as "AMD EPYC", or its architecture if the system does not tell the model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def allocator() -> str:
    """Returns the settings of glibc's allocator in the environment variables, or "default" if there are none."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _ALLOCATOR if name in os.environ) or "default"


def gpu(device: torch.device) -> dict[str, Any]:
    """Returns the GPU's model, its properties, and the versions of its driver, libraries and compilers."""
    properties = torch.cuda.get_device_properties(device)
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    try:
        import triton

        version: str | None = triton.__version__
    except ImportError:
        version = None
    return {
        "device": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "L2 MB": properties.L2_cache_size / 2**20,
        "memory MB": properties.total_memory // 2**20,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "triton": version,
        "nvcc": (re.findall(r"release (\S+),", _output(nvcc, "--version")) or [None])[0],
        "host": platform.machine(),
        "nvidia-smi": dict(zip(_QUERIED.split(","), _query(_QUERIED).split(", "), strict=False)),
    }


def clock_under_load(device: torch.device) -> float:
    """Returns the clock rate of the first GPU in MHz while `device` computes matrix products."""
    left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(_query, "clocks.sm")
        while not answer.done():
            for _ in range(20):
                left @ right
            torch.cuda.synchronize()
    return float(answer.result().split()[0])


def sources(root: Path = _CHECKOUT) -> str:
    """Returns a hash of all source files that affect a measurement. It identifies copies of a checkout without git."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "csrc", "spade_kernels", "spade_model"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _commit() -> str | None:
    if not (_CHECKOUT / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    return _output(*command).strip() or None


def _query(what: str) -> str:
    """Returns the values of the fields `what`, separated by commas, of the first GPU; "0" without nvidia-smi."""
    lines = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "0"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
