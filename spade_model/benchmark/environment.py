"""Where and when something was measured."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import spade_kernels as sk

_ALLOCATOR = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_")


def environment() -> dict[str, Any]:
    """Device, versions, date, commit (None outside a checkout) and the allocator's setting."""
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
    """The processor's model, such as "AMD EPYC"; the architecture where the system does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def allocator() -> str:
    """ "default", or glibc's thresholds as set in the environment: above them freed memory goes back to the system."""
    return ", ".join(f"{name}={os.environ[name]}" for name in _ALLOCATOR if name in os.environ) or "default"


def _commit() -> str | None:
    # An installed package may lie within somebody else's checkout.
    checkout = Path(__file__).resolve().parents[2]
    if not (checkout / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        done = subprocess.run(command, cwd=checkout, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
