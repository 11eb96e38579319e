"""Runs one measurement of `make gpu-check` in a separate process, so that a failing kernel does not stop the others.

    python -m benchmarks.gpu_measure prepare --work folder --dataroot folder
    python -m benchmarks.gpu_measure part eval-bf16-8 --suites eval --at bf16-8 --baseline --work folder

`prepare` writes the masks and a description of this machine for the other processes. `part` runs suites, and writes
each result to `<name>.jsonl` as soon as it is measured. `benchmarks/gpu_check.py` has the commands of all parts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch

from benchmarks.gpu_suites import COMPILE
from benchmarks.gpu_suites.compilation import both_compiled, compile_layers, compile_networks
from benchmarks.gpu_suites.evaluation import evaluation
from benchmarks.gpu_suites.layers import layers
from benchmarks.gpu_suites.operators import agreement, operators, window_index
from benchmarks.gpu_suites.training import training
from spade_model.benchmark.clock import settled
from spade_model.benchmark.environment import clock_under_load, environment, gpu, sources
from spade_model.benchmark.masks import bench_masks, busiest, coco_or_toy, load_masks, noise, save_masks, settings
from spade_model.benchmark.results import GPU_CLOCK, PartFile, Result
from spade_model.benchmark.workload import Workload

_MASKS, _ABOUT = "masks.pt", "about.json"
_FOUND, _BUSIEST, _NOISE = 16, 2, 8


def suite(name: str, precision: str, batch: int, with_baseline: bool) -> Callable[[Workload], Iterator[Result]]:
    """Returns the suite of this name for a precision and a batch size.

    Raises:
        KeyError: there is no such suite.
    """
    suites: dict[str, Callable[[Workload], Iterator[Result]]] = {
        "eval": lambda work: evaluation(work, precision, batch, with_baseline=with_baseline),
        "training": lambda work: training(work, precision, batch, with_baseline=with_baseline),
        "compiled": lambda work: both_compiled(work, precision, batch),
        "layers": lambda work: layers(work, precision, training=False, with_baseline=with_baseline),
        "layers-training": lambda work: layers(work, precision, training=True, with_baseline=with_baseline),
        "indexes": window_index,
        "operators": lambda work: operators(work, precision),
        "agreement": lambda work: agreement(work, precision),
        "compile-eval": lambda work: compile_networks(work, precision, batch, gradients=False),
        "compile-training": lambda work: compile_networks(work, precision, batch, gradients=True),
        "compile-layers": lambda work: compile_layers(work, precision),
    }
    return suites[name]


def prepare(folder: Path, dataroot: str, device: torch.device, ngf: int, size: int) -> None:
    """Writes the masks, and a description of the masks and this machine, to files in `folder`."""
    kinds = bench_masks(coco_or_toy(dataroot, size), _FOUND, every_kind=False)
    found = next(iter(kinds.values()))
    kinds |= {"busiest": busiest(found, _BUSIEST), "noise": noise(found[0], _NOISE)}
    save_masks(kinds, folder / _MASKS)
    where = environment() | {"dataroot": Path(dataroot).name, "sources": sources()}
    if device.type == "cuda":
        where = gpu(device) | {"cpu": where.pop("device")} | where
    (folder / _ABOUT).write_text(json.dumps({"environment": where, "settings": settings(ngf, kinds)}))


def measure(path: Path, part: Callable[[Workload], Iterator[Result]], work: Workload) -> dict[str, str]:
    """Runs the suites of one part and writes their results to `path`, followed by the clock rate under load.

    Returns a dict from each provider that failed to the reason.
    """
    with settled(work.device):
        PartFile(path).write(_lines(path.stem, part, work))
    return work.failed


def _lines(
    name: str, part: Callable[[Workload], Iterator[Result]], work: Workload
) -> Iterator[Result | Mapping[str, str]]:
    written: dict[str, str] = {}
    for result in part(work):
        yield result
        if written != work.failed:
            written = dict(work.failed)
            yield written
    yield work.failed
    if work.device.type == "cuda" and not name.startswith(COMPILE):
        yield Result.of(GPU_CLOCK, name, "sm", [clock_under_load(work.device)], "MHz")


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    preparing, measuring = commands.add_parser("prepare"), commands.add_parser("part")
    for command in (preparing, measuring):
        command.add_argument("--work", type=Path, required=True, help="folder for masks and results")
        command.add_argument("--device", default="cuda")
        command.add_argument("--ngf", type=int, default=64, help="generator width")
    preparing.add_argument("--dataroot", default="", help="folder of masks in the coco layout")
    preparing.add_argument("--size", type=int, default=256, help="width and height of masks, in pixels")
    measuring.add_argument("name", help="name of the result file, without its suffix")
    measuring.add_argument("--suites", nargs="+", required=True)
    measuring.add_argument("--at", nargs="+", required=True, help="precision and batch size, such as bf16-8")
    measuring.add_argument(
        "--baseline", action="store_true", help="also measure baselines that take minutes to compile"
    )
    measuring.add_argument("--batch", type=int, default=8, help="default batch size")
    measuring.add_argument("--repeats", type=int, default=30)
    measuring.add_argument("--seconds", type=float, default=8.0, help="time limit of each measurement")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    device, folder = torch.device(arguments.device), arguments.work
    if arguments.command == "prepare":
        prepare(folder, arguments.dataroot, device, arguments.ngf, arguments.size)
        return 0
    chosen = [
        suite(name, precision, int(batch), arguments.baseline)
        for precision, batch in (at.split("-") for at in arguments.at)
        for name in arguments.suites
    ]
    masks = load_masks(folder / _MASKS)
    work = Workload(device, arguments.ngf, masks, arguments.batch, arguments.repeats, arguments.seconds)
    failed = measure(
        folder / f"{arguments.name}.jsonl", lambda work: (result for run in chosen for result in run(work)), work
    )
    print("; ".join(f"left out: {who}: {why}" for who, why in failed.items()) or "nobody left out")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
