"""The environment says where and when something was measured."""

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
# An installed package may lie within somebody else's.
_CHECKOUT = Path(__file__).resolve().parents[2]


def environment() -> dict[str, Any]:
    """Returns device, versions, date, commit (None outside a checkout) and the allocator's setting."""
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
    """Returns the processor's model, such as "AMD EPYC"; the architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def allocator() -> str:
    """ "default", or glibc's thresholds as set in the environment: above them freed memory goes back to the system."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _ALLOCATOR if name in os.environ) or "default"


def gpu(device: torch.device) -> dict[str, Any]:
    """Returns the GPU's model and limits, and the versions of its compilers and driver."""
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
    """Returns the MHz of the first GPU while it computes products."""
    left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(_query, "clocks.sm")
        while not answer.done():
            for _ in range(20):
                left @ right
            torch.cuda.synchronize()
    return float(answer.result().split()[0])


def sources(root: Path = _CHECKOUT) -> str:
    """Returns a hash of all measured and measuring sources; a copy of the checkout may have no commit."""
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
    """Returns nvidia-smi's answer for the first GPU; asks only, sets nothing."""
    lines = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "0"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=_CHECKOUT, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
