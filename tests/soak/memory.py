"""Memory and open files of a training run with many steps."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path
from statistics import median
from typing import Any

from soak.runs import begin

_PAGE = 4096 / 1e6
_GROWTH = 0.01


def memory(folder: Path, steps: int, *, compare: bool = True) -> dict[str, Any]:
    """Trains with 0 and with 2 workers; resident memory and open files do not grow from the second quarter to the last.

    Args:
        compare: False skips the comparison, for runs so short that the first steps' allocations look like growth.
    """
    found: dict[str, Any] = {"steps": steps}
    for workers in (0, 2):
        options = ["--num_workers", workers, "--print_freq", 100, "--save_latest_freq", 500, "--max_dataset_size", 1000]
        process = begin(folder / str(workers), steps, *options, stderr=subprocess.DEVNULL)
        sizes, files = _watch(process)
        assert process.returncode == 0
        quarter = max(1, len(sizes) // 4)
        before, after = median(sizes[quarter : 2 * quarter] or sizes), median(sizes[-quarter:])
        counts = median(files[quarter : 2 * quarter] or files), median(files[-quarter:])
        key = f"{workers} workers"
        found[key] = {"MB": [round(before, 1), round(after, 1)], "open files": list(counts), "samples": len(sizes)}
        if compare:
            assert after <= before * (1 + _GROWTH), f"{key}: memory grows: {found[key]}"
            assert counts[1] <= counts[0], f"{key}: open files grow: {found[key]}"
    return found


def _watch(process: subprocess.Popen) -> tuple[list[float], list[int]]:
    """Returns the resident memory in MB and the number of open files of a process, every half second until it ends."""
    sizes, files, folder = [], [], Path(f"/proc/{process.pid}")
    while process.poll() is None:
        try:
            size = int((folder / "statm").read_text().split()[1]) * _PAGE
            files.append(len(list((folder / "fd").iterdir())))
        except (OSError, IndexError):
            continue
        sizes.append(size)
        time.sleep(0.5)
    return sizes, files
