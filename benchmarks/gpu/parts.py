"""The parts of the measurement: each a process of its own, so that a failing kernel ends one part and no more.

A part writes a line for each result as soon as it has it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
import shutil
import subprocess
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gpu import ROOT, generator, layers
from gpu.batches import Workload, load_masks, read_masks, save_masks
from gpu.clock import settled
from gpu.generator import both_compiled, evaluation, training
from gpu.operators import agreement, operators, window_index
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import distinct_fractions
from spade_model.benchmark.results import Result

Part = Callable[[Workload], Iterator[Result]]

CLOCK, FAILURES = "clock", "failed"
COMPILE, UNCOMPILED = "compile ", "-uncompiled"
_MASKS, _ABOUT = "masks.pt", "about.json"
_QUERIED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"


def parts(batch: int, others: tuple[int, ...]) -> dict[str, Part]:
    """By name, the most important ones first.

    Args:
        batch: batch size that everything is measured at. others: that whole networks are measured at, too.
    """
    found: dict[str, Part] = {}
    for with_baseline in (True, False):
        end = "" if with_baseline else UNCOMPILED
        found |= {
            f"eval-bf16-{batch}{end}": partial(evaluation, precision="bf16", batch=batch, with_baseline=with_baseline),
            f"training-bf16-{batch}{end}": partial(
                training, precision="bf16", batch=batch, with_baseline=with_baseline
            ),
            f"layers-bf16-{batch}{end}": partial(_both_layers, precision="bf16", with_baseline=with_baseline),
        }
    found[f"operators-bf16-{batch}"] = _operators
    # All of the others without the baseline, as compiling takes minutes; with it as far as there is time.
    rest = [(precision, size) for precision in ("tf32", "bf16") for size in (batch, *others)]
    rest.remove(("bf16", batch))
    for name, measure in (("eval", evaluation), ("training", training)):
        found[f"{name}-others{UNCOMPILED}"] = partial(_uncompiled, measure=measure, sizes=rest)
    found[f"compiled-bf16-{batch}"] = partial(both_compiled, precision="bf16", batch=batch)
    found[f"operators-tf32-{batch}"] = partial(operators, precision="tf32")
    for precision, size in rest:
        for name, measure in (("eval", evaluation), ("training", training)):
            found[f"{name}-{precision}-{size}"] = partial(measure, precision=precision, batch=size, with_baseline=True)
    found[f"layers-tf32-{batch}"] = partial(_both_layers, precision="tf32", with_baseline=True)
    found[f"operators-fp16-{batch}"] = partial(operators, precision="fp16")
    return found


def agreements(*precisions: str) -> dict[str, Part]:
    """Comparisons at full size, which take no times and may run beside other steps."""
    return {f"agreement {precision}": partial(agreement, precision=precision) for precision in precisions}


def compilations(batch: int) -> dict[str, Part]:
    """For the parts that come first, their baselines' compiling; it takes minutes, but may run beside other steps.

    What the compiler finds fastest meanwhile may not be what it would find on a device of its own.
    """
    return {
        f"{COMPILE}eval-bf16-{batch}": partial(generator.compilation, precision="bf16", batch=batch, gradients=False),
        f"{COMPILE}training-bf16-{batch}": partial(
            generator.compilation, precision="bf16", batch=batch, gradients=True
        ),
        f"{COMPILE}layers-bf16-{batch}": partial(layers.compilation, precision="bf16"),
    }


def in_order(names: Collection[str], compiled: Collection[str]) -> list[str]:
    """The parts to measure, where compiling `compiled` has succeeded.

    Where it has not, what needs no compiler is measured in the part's place, and the whole part last.
    """
    late = [name for name in names if f"{name}{UNCOMPILED}" in names and name not in compiled]
    done = {f"{name}{UNCOMPILED}" for name in compiled}
    return [name for name in names if name not in late and name not in done] + late


def prepare(folder: Path, dataroot: str, device: torch.device, ngf: int, size: int) -> None:
    """Finds the masks, and says where and on what the parts measure."""
    masks = read_masks(dataroot, size)
    save_masks(masks, folder / _MASKS)
    where = environment() | {"dataroot": Path(dataroot).name, "sources": sources()}
    if device.type == "cuda":
        where = _gpu(device) | {"cpu": where.pop("device")} | where
    first = next(iter(masks.values()))
    settings = {"ngf": ngf, "channels": first[0].channels, "masks": len(first)}
    settings |= {"distinct windows": distinct_fractions(masks)}
    (folder / _ABOUT).write_text(json.dumps({"environment": where, "settings": settings}))


def sources(root: Path = ROOT) -> str:
    """A hash of what is measured and what measures; a copy of the checkout may have no commit."""
    digest = hashlib.sha256()
    for folder in ("benchmarks", "csrc", "spade_kernels", "spade_model"):
        for path in sorted((root / folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def about(folder: Path) -> dict[str, Any] | None:
    """The environment and settings that `prepare` wrote; None if it has not run."""
    path = folder / _ABOUT
    return json.loads(path.read_text()) if path.exists() else None


def measure(name: str, part: Part, folder: Path, work_of: Callable[[dict], Workload]) -> dict[str, str]:
    """Runs one part, writing to `<name>.jsonl`, last of all the clock under load; returns who was left out, and why."""
    work = work_of(load_masks(folder / _MASKS))
    with (folder / f"{name}.jsonl").open("w") as file, settled(work.device):
        written: dict[str, str] = {}
        for result in part(work):
            print(json.dumps(asdict(result)), file=file, flush=True)
            if written != work.failed:
                written = dict(work.failed)
                print(json.dumps({FAILURES: written}), file=file, flush=True)
        print(json.dumps({FAILURES: work.failed}), file=file, flush=True)
        if work.device.type == "cuda" and not name.startswith(COMPILE):
            print(json.dumps(asdict(Result.of(CLOCK, name, "sm", [_clock_under_load(work.device)], "MHz"))), file=file)
    return work.failed


def _clock_under_load(device: torch.device) -> float:
    """MHz, asked for while products are being computed."""
    left, right = torch.randn(2, 8192, 8192, dtype=torch.bfloat16, device=device)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(_query, "clocks.sm")
        while not answer.done():
            for _ in range(20):
                left @ right
            torch.cuda.synchronize()
    return float(answer.result().split()[0])


def _operators(work: Workload) -> Iterator[Result]:
    yield from window_index(work)
    yield from operators(work, "bf16")


def _both_layers(work: Workload, precision: str, with_baseline: bool) -> Iterator[Result]:
    for with_gradients in (False, True):
        yield from layers.layers(work, precision, training=with_gradients, with_baseline=with_baseline)


def _uncompiled(work: Workload, measure: Callable, sizes: list[tuple[str, int]]) -> Iterator[Result]:
    for precision, batch in sizes:
        yield from measure(work, precision, batch, with_baseline=False)


def _gpu(device: torch.device) -> dict[str, Any]:
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


def _query(what: str) -> str:
    """nvidia-smi's answer for the first GPU; asks only, sets nothing."""
    lines = _output("nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader").splitlines()
    return lines[0].strip() if lines else "0"


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
