"""Everything that takes a GPU: builds, tests, sanitizes and measures, and prints what came of it last.

    python benchmarks/gpu_check.py [--fast] [--minutes 8] [--dataroot folder] [--out folder or file] [--only name ...]

Any Python with a CUDA torch, and nvcc. A step that fails does not keep later ones from running; what there is no time
for is "not run". With --only, results that earlier runs took of the same code on the same device stay in the file.

Exit status: 0 where all that had to run ran, and passed; 1 where something failed; 2 without a GPU; 3 where nothing
failed, but something that had to run did not: with --fast or --only the bounds need not all be measured.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import math
import os
import re
import sys
import traceback
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from gpu import ROOT, sanitizers
from gpu.steps import FAILED, NOT_RUN, PASSED, Job, Step, Steps, by_exit_status, python, table

NEEDS = ("numpy", "PIL")  # of the masks and the networks
DATAROOTS = [root / "data" / "coco_stuff" for root in (ROOT.parent / "shared", ROOT / "shared", ROOT)]
TESTS = (
    "tests/gpu",
    "tests/triton_kernels",
    "tests/test_ops.py",
    "tests/test_window_index.py",
    "tests/test_layers.py",
    "tests/test_label_map.py",
    "tests/test_conv.py",
    "tests/test_freezing.py",
    "tests/test_layer_compile.py",
    "tests/test_static.py",
    "tests/test_determinism.py",
    "tests/test_distributed.py::test_two_processes_equal_one_with_the_doubled_batch",
)
COMPILED = "tests/test_compiled.py"
REPEATED = "hundred_times_under_load"  # in the names of the tests that are a step of their own
_FAST_TESTS = 1  # comparisons and sanitizers run the others' kernels, too
# As ids begin: what the backends for CPU tensors do is tested elsewhere.
CHOSEN = ("-k", f"not {REPEATED} and not [cpu and not [reference")
_KEPT, _FAST_KEPT = 0.4, 0.3  # of the time, for measuring, whatever the steps before take
_MINUTES, _FAST_MINUTES = 8.0, 3.0
_RESERVE = 10.0  # seconds for the tables
_WORKERS = 6
_RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    if arguments.part or arguments.prepare:
        return child(arguments)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: not run: there is no GPU that PyTorch can use", file=sys.stderr)
        return 2
    return check(arguments)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fast", action="store_true", help=f"{_FAST_MINUTES:g} minutes, the most important alone")
    parser.add_argument("--minutes", type=float, help="what is not running by then is not run")
    there = next((str(folder) for folder in DATAROOTS if folder.is_dir()), "")
    parser.add_argument(
        "--dataroot", default=there, help=f"folder of masks in the coco layout; default: {there or 'toy landscapes'}"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="JSON file, or its folder")
    parser.add_argument("--only", nargs="*", default=[], help="names of steps to run; * stands for anything")
    parser.add_argument("--device", default="cuda", help="cpu: to try the measurements themselves")
    parser.add_argument("--tiny", action="store_true", help="small networks and few repeats, for the same")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "gpu_check", help="folder for logs and parts")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--prepare", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    arguments.minutes = arguments.minutes or (_FAST_MINUTES if arguments.fast else _MINUTES)
    arguments.batch, arguments.others = (2, (1,)) if arguments.tiny else (8, () if arguments.fast else (1, 32))
    arguments.compared = ("bf16",) if arguments.fast else ("bf16", "tf32", "fp16")
    arguments.ngf, arguments.size = (2, 64) if arguments.tiny else (64, 256)
    return arguments


def child(arguments: argparse.Namespace) -> int:
    """Measures one part, or prepares for all; in a process of its own."""
    from gpu import parts
    from gpu.batches import Workload

    device = torch.device(arguments.device)
    if arguments.prepare:
        parts.prepare(arguments.work, arguments.dataroot, device, arguments.ngf, arguments.size)
        return 0
    repeats, seconds = (3, 0.1) if arguments.tiny else (30, 4.0 if arguments.fast else 8.0)
    known = parts.parts(arguments.batch, arguments.others) | parts.agreements(*arguments.compared)
    known |= parts.compilations(arguments.batch)
    failed = parts.measure(
        arguments.part,
        known[arguments.part],
        arguments.work,
        lambda masks: Workload(device, arguments.ngf, masks, arguments.batch, repeats, seconds),
    )
    print("; ".join(f"left out: {who}: {why}" for who, why in failed.items()) or "nobody left out")
    return int(bool(failed))


def check(arguments: argparse.Namespace) -> int:
    """All steps; prints their table and returns the exit status."""
    folder, log = arguments.work, arguments.work / "gpu_check.log"
    if arguments.out != _RESULTS:
        log = (arguments.out.parent if is_file(arguments.out) else arguments.out) / log.name
    steps = Steps(folder, log, ROOT, 60 * arguments.minutes - _RESERVE)
    (folder / "about.json").unlink(missing_ok=True)
    if arguments.device == "cuda":
        steps.run(*wanted([build()], arguments.only))
    beside: list[Job] = []
    names: list[str] = []
    try:
        # Not before there are compiled kernels to import.
        from gpu import parts
    except ImportError:
        traceback.print_exc()
        missing = [name for name in NEEDS if importlib.util.find_spec(name) is None]
        steps.skip("measurements", f"{', '.join(missing) or 'a module'} cannot be imported")
    else:
        first = [] if arguments.fast else list(parts.compilations(arguments.batch))
        every = [*first, *parts.agreements(*arguments.compared)]
        beside = wanted([measurement(name, arguments, math.inf) for name in every], arguments.only)
        every = list(parts.parts(arguments.batch, arguments.others))
        names = [name for name in every if is_wanted(name, arguments.only)]
    for name in (*(job.name for job in beside), *names):
        (folder / f"{name}.jsonl").unlink(missing_ok=True)
    if beside or names:
        steps.run(Job("prepare", command(arguments, "--prepare"), 120, needs=NEEDS))
    may_miss = {"bounds"} if arguments.fast or arguments.only else set()
    may_miss |= {*names, *(job.name for job in beside if job.may_be_cut)}
    if arguments.device == "cuda":
        sanitized = [sanitizers.job(tool, 200) for tool in sanitizers.TOOLS]
        # They may be too slow for --fast; otherwise something hangs.
        every_test = [replace(job, may_be_cut=arguments.fast) for job in (*tests(arguments.fast), *sanitized)]
        beside += wanted(every_test, arguments.only)
    # Together: they take no times, and compile what the measurements need.
    kept = 60 * arguments.minutes * (_FAST_KEPT if arguments.fast else _KEPT)
    steps.run(*beside, keep=kept if names else 0)
    print(f"{max(steps.left, 0):.0f} s left for measurements", flush=True)
    if names:
        passed = [step.name.removeprefix(parts.COMPILE) for step in steps.done if step.status == PASSED]
        names = parts.in_order(names, passed)
    # A part that does not end leaves most of the time to others.
    measured = [measurement(name, arguments, 15 * arguments.minutes) for name in names]
    for job in measured:
        steps.run(job, least=10)
        saved(arguments, beside + measured, steps)
    print("", saved(arguments, beside + measured, steps, final=bool(names)), table(steps.done), sep="\n\n")
    print(f"\nall output: {log}")
    return exit_status(steps.done, may_miss)


def exit_status(done: Sequence[Step], may_miss: Collection[str]) -> int:
    """1 where a step failed, 3 where one was not run that may not be missed."""
    if any(step.status == FAILED for step in done):
        return 1
    return 3 if any(step.status == NOT_RUN and step.name not in may_miss for step in done) else 0


def build() -> Job:
    command = python("setup.py", "build_ext", "--inplace")
    # Without a list of architectures they are those of the GPUs at hand.
    environment = {"SPADE_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ""}
    return Job("build", command, 300, environment, needs=("setuptools", "ninja"))


def tests(fast: bool) -> list[Job]:
    """The tests whose bodies run on a GPU where there is one, and those of what compiles for GPUs."""
    repeated = pytest("determinism", "-k", REPEATED, "tests/gpu/test_device.py")
    workers = ["-n", _WORKERS] if importlib.util.find_spec("xdist") else []
    if fast:
        return [pytest("tests", *workers, *CHOSEN, *TESTS[:_FAST_TESTS]), repeated]
    chosen = pytest("tests", *workers, *CHOSEN, *TESTS)
    return [chosen, repeated, pytest("tests of compiled kernels", *workers, COMPILED)]


def pytest(name: str, *arguments: object) -> Job:
    """Names each test as soon as it is over: of a run that is cut they tell how far it came."""
    command = python("-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments)
    # What tests start must find the package, too.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return Job(name, command, 240, {"PYTHONPATH": path}, judge=tests_passed, needs=("pytest", "hypothesis"))


def tests_passed(status: int, output: str) -> tuple[str, str]:
    """PASSED only where some ran."""
    judged, last = by_exit_status(status, output)
    if status == 0 and not re.search(r"\b[1-9]\d* passed", last):
        return FAILED, f"no test ran: {last}"
    return judged, last


def measurement(name: str, arguments: argparse.Namespace, limit: float) -> Job:
    """A part, a comparison or a compilation."""
    is_part = not name.startswith("agreement")
    return Job(name, command(arguments, "--part", name), limit, may_be_cut=is_part, needs=NEEDS)


def command(arguments: argparse.Namespace, *more: str) -> list[str]:
    """This program in a process of its own, on the same device and masks."""
    how = ["--device", arguments.device, "--work", arguments.work, "--dataroot", arguments.dataroot]
    flags = [f"--{name}" for name in ("fast", "tiny") if getattr(arguments, name)]
    return python(Path(__file__).resolve(), *how, *flags, *more)


def is_file(out: Path) -> bool:
    return out.suffix == ".json"


def is_wanted(name: str, only: Sequence[str]) -> bool:
    return not only or any(fnmatch.fnmatch(name, pattern) for pattern in only)


def wanted(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    return [job for job in jobs if is_wanted(job.name, only)]


def saved(arguments: argparse.Namespace, jobs: Sequence[Job], steps: Steps, final: bool = False) -> str:
    """Writes the file; returns its tables. At the end the bounds count as a step, too."""
    try:
        from gpu import parts, report

        from spade_model.benchmark.results import BenchRun
    except ImportError:
        return "(nothing was measured)"
    about = parts.about(arguments.work)
    if about is None:
        return "(nothing was measured)"
    path = arguments.out if is_file(arguments.out) else arguments.out / report.file_name(about["environment"])
    names = [job.name for job in jobs]
    results, failed = report.gathered(arguments.work, names), report.failures(arguments.work, names)
    done = list(steps.done)
    if arguments.only:
        before = report.earlier(path, about["environment"])
        results = report.merged(before[0], results)
        done = [step for step in before[1] if step.name not in {s.name for s in done}] + done
        failed = {part: who for part, who in before[2].items() if part not in names} | failed
    run = BenchRun(about["environment"], about["settings"], results)
    verdicts = report.verdicts(run, arguments.batch, done)
    if final:
        steps.done.append(report.judged(verdicts))
    report.save(path, run, verdicts, done, failed)
    return f"{report.tables(run, verdicts, failed)}\n\nresults: {path}"


if __name__ == "__main__":
    sys.exit(main())
