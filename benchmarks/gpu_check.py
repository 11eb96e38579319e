"""Builds, tests, sanitizes and benchmarks the GPU kernels on a GPU, and prints tables of the results at the end.

    python -m benchmarks.gpu_check [--fast] [--minutes 8] [--dataroot folder] [--out folder or file] [--only name ...]

It needs nvcc, and a torch with CUDA. Steps run even if earlier ones failed; steps for which no time is left are
reported as "not run". With --only, the result file keeps earlier results of the same code on the same device.

The exit status is 0 if all required steps passed; 1 if a step failed; 2 without a GPU; and 3 if no step failed but a
required one did not run. Measurements of targets are not required with --fast and --only.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.util
import json
import math
import os
import re
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu_suites import COMPILE, UNCOMPILED, sanitizers
from spade_model.benchmark.steps import (
    ALONE,
    FAILED,
    MEASUREMENT,
    NOT_RUN,
    TOGETHER,
    Job,
    Step,
    Steps,
    by_exit_status,
    python,
    table,
)

ROOT = Path(__file__).resolve().parents[1]
NEEDS = ("numpy", "PIL", "tyro")  # modules that the masks and networks import
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
REPEATED = "hundred_times_under_load"  # part of the names of the tests that run in the separate step "determinism"
_FAST_TESTS = 1  # number of TESTS that --fast runs; the steps "agreement" and "sanitizer" run the other kernels
# Tests of the CPU backends, whose ids begin like this, do not need a GPU.
CHOSEN = ("-k", f"not {REPEATED} and not [cpu and not [reference")
_KEPT, _FAST_KEPT = 0.4, 0.3  # fraction of the time that is reserved for measurements
_MINUTES, _FAST_MINUTES = 8.0, 3.0
_RESERVE = 10.0  # seconds that are reserved for the tables
_WORKERS = 6
_RESULTS = ROOT / "benchmarks" / "results"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parsed(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: not run: there is no GPU that PyTorch can use", file=sys.stderr)
        return 2
    return check(arguments)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--fast", action="store_true", help=f"run only the most important steps, in {_FAST_MINUTES:g} minutes"
    )
    parser.add_argument("--minutes", type=float, help="time limit of all steps together")
    there = next((str(folder) for folder in DATAROOTS if folder.is_dir()), "")
    parser.add_argument(
        "--dataroot", default=there, help=f"folder of masks in the coco layout; default: {there or 'toy landscapes'}"
    )
    parser.add_argument("--out", type=Path, default=_RESULTS, help="JSON file for the results, or a folder for it")
    parser.add_argument("--only", nargs="*", default=[], help="names of the steps to run, with * as a wildcard")
    parser.add_argument("--device", default="cuda", help="cpu: test this program without a GPU")
    parser.add_argument("--tiny", action="store_true", help="small networks and few repeats, to test this program")
    parser.add_argument(
        "--work",
        type=Path,
        default=ROOT / "build" / "gpu_check",
        help="folder for logs and for the results of each step",
    )
    arguments = parser.parse_args(argv)
    arguments.minutes = arguments.minutes or (_FAST_MINUTES if arguments.fast else _MINUTES)
    arguments.batch, arguments.others = (2, (1,)) if arguments.tiny else (8, () if arguments.fast else (1, 32))
    arguments.compared = ("bf16",) if arguments.fast else ("bf16", "tf32", "fp16")
    arguments.ngf, arguments.size = (2, 64) if arguments.tiny else (64, 256)
    arguments.repeats, arguments.seconds = (3, 0.1) if arguments.tiny else (30, 4.0 if arguments.fast else 8.0)
    return arguments


def check(arguments: argparse.Namespace) -> int:
    """Runs all jobs, prints the table of their steps and returns the exit status."""
    log = arguments.work / "gpu_check.log"
    if arguments.out != _RESULTS:
        log = (arguments.out.parent if is_file(arguments.out) else arguments.out) / log.name
    steps = Steps(arguments.work, log, ROOT, 60 * arguments.minutes - _RESERVE)
    jobs = plan(arguments)
    about(arguments.work).unlink(missing_ok=True)
    for job in jobs:
        if job.writes:
            job.writes.unlink(missing_ok=True)
    run(jobs, steps, lambda: saved(arguments, jobs, steps))
    is_measured = any(job.stage == MEASUREMENT for job in jobs)
    print("", saved(arguments, jobs, steps, final=is_measured), table(steps.done), sep="\n\n")
    print(f"\nall output: {log}")
    may_miss = {"bounds"} if arguments.fast or arguments.only else set()
    return exit_status(steps.done, may_miss | {job.name for job in jobs if job.writes and job.may_be_cut})


def plan(arguments: argparse.Namespace) -> list[Job]:
    """Returns all jobs, in the order in which they run."""
    is_on_gpu, minutes, only = arguments.device == "cuda", arguments.minutes, arguments.only
    measured = wanted(measurements(arguments), only)
    together = [*compilations(arguments), *agreements(arguments)]
    if is_on_gpu:
        tested = [*tests(arguments.fast), *(sanitizers.job(tool, 200) for tool in sanitizers.TOOLS)]
        # With --fast the time limit may end them; without it, only a job that hangs exceeds the limit.
        together += [replace(job, may_be_cut=arguments.fast) for job in tested]
    # These jobs time nothing, so they can run together. They compile kernels that the measurements reuse.
    keep = 60 * minutes * (_FAST_KEPT if arguments.fast else _KEPT) if measured else 0.0
    together = [replace(job, stage=TOGETHER, keep=keep) for job in wanted(together, only)]
    alone = wanted([build()], only) if is_on_gpu else []
    if any(job.writes for job in (*together, *measured)):
        alone.append(preparation(arguments))
    return [*alone, *together, *measured]


def run(jobs: Sequence[Job], steps: Steps, save: Callable[[], object]) -> None:
    """Runs the jobs stage by stage, and calls `save` after every measurement."""
    for job in jobs:
        if job.stage == ALONE:
            steps.run(job)
    steps.run(*(job for job in jobs if job.stage == TOGETHER))
    print(f"{max(steps.left, 0):.0f} s left for measurements", flush=True)
    for job in jobs:
        if job.stage == MEASUREMENT and job.is_due(steps.passed):
            steps.run(job)
            save()


def exit_status(done: Sequence[Step], may_miss: Collection[str]) -> int:
    """Returns 1 if a step failed, 3 if a step outside `may_miss` was not run, and otherwise 0."""
    if any(step.status == FAILED for step in done):
        return 1
    return 3 if any(step.status == NOT_RUN and step.name not in may_miss for step in done) else 0


def build() -> Job:
    command = python("setup.py", "build_ext", "--inplace")
    # With an empty list of architectures, torch compiles for the GPUs of this machine.
    environment = {"SPADE_KERNELS_BUILD": "cuda", "TORCH_CUDA_ARCH_LIST": ""}
    return Job("build", command, 300, environment, needs=("setuptools", "ninja"))


def tests(fast: bool) -> list[Job]:
    """Returns the jobs of the tests that use a GPU if there is one, and of the tests of compiled GPU kernels."""
    repeated = pytest("determinism", "-k", REPEATED, "tests/gpu/test_device.py")
    workers = ["-n", _WORKERS] if importlib.util.find_spec("xdist") else []
    if fast:
        return [pytest("tests", *workers, *CHOSEN, *TESTS[:_FAST_TESTS]), repeated]
    chosen = pytest("tests", *workers, *CHOSEN, *TESTS)
    return [chosen, repeated, pytest("tests of compiled kernels", *workers, COMPILED)]


def pytest(name: str, *arguments: object) -> Job:
    """Returns a job that runs pytest. Each test is printed when it ends, so that the output shows the progress."""
    command = python("-m", "pytest", "-v", "-p", "no:cacheprovider", *arguments)
    # Processes that the tests start must be able to import the package, too.
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    return Job(name, command, 240, {"PYTHONPATH": path}, judge=tests_passed, needs=("pytest", "hypothesis"))


def tests_passed(status: int, output: str) -> tuple[str, str]:
    """Judges a run of pytest: like `by_exit_status`, but FAILED if no test passed."""
    judged, last = by_exit_status(status, output)
    if status == 0 and not re.search(r"\b[1-9]\d* passed", last):
        return FAILED, f"no test ran: {last}"
    return judged, last


def measurements(arguments: argparse.Namespace) -> list[Job]:
    """Returns the measurements, the most important ones first.

    If the compilation for one of the first measurements did not pass, only the providers without torch.compile are
    measured at its place, and all providers at the end.
    """
    # A measurement that hangs may take only a quarter of the time.
    limit = 15 * arguments.minutes
    part = partial(measurement, arguments, limit=limit, stage=MEASUREMENT, may_be_cut=True, least=10.0)
    batch, main = arguments.batch, [("bf16", arguments.batch)]
    first = {
        f"eval-bf16-{batch}": ("eval",),
        f"training-bf16-{batch}": ("training",),
        f"layers-bf16-{batch}": ("layers", "layers-training"),
    }
    # The others are measured without the baseline first, because its compilation takes minutes; then with it, as far
    # as time permits.
    others = [(precision, size) for precision in ("tf32", "bf16") for size in (batch, *arguments.others)]
    others.remove(("bf16", batch))
    whole = ("eval", "training")
    return [
        *(part(name, suites, main, "--baseline", after=f"{COMPILE}{name}") for name, suites in first.items()),
        *(part(f"{name}{UNCOMPILED}", suites, main, unless=f"{COMPILE}{name}") for name, suites in first.items()),
        part(f"operators-bf16-{batch}", ("indexes", "operators"), main),
        *(part(f"{suite}-others{UNCOMPILED}", (suite,), others) for suite in whole),
        part(f"compiled-bf16-{batch}", ("compiled",), main),
        part(f"operators-tf32-{batch}", ("operators",), [("tf32", batch)]),
        *(
            part(f"{suite}-{precision}-{size}", (suite,), [(precision, size)], "--baseline")
            for precision, size in others
            for suite in whole
        ),
        part(f"layers-tf32-{batch}", ("layers", "layers-training"), [("tf32", batch)], "--baseline"),
        part(f"operators-fp16-{batch}", ("operators",), [("fp16", batch)]),
        *(part(name, suites, main, "--baseline", unless=f"{COMPILE}{name}") for name, suites in first.items()),
    ]


def compilations(arguments: argparse.Namespace) -> list[Job]:
    """Returns jobs that compile the baselines of the first measurements.

    Compiling takes minutes, but can run at the same time as other jobs. Autotuning may then choose other kernels than
    it would on an idle device.
    """
    at = [("bf16", arguments.batch)]
    return [
        measurement(arguments, f"{COMPILE}{what}-bf16-{arguments.batch}", (f"compile-{what}",), at, may_be_cut=True)
        for what in ("eval", "training", "layers")
        if not arguments.fast
    ]


def agreements(arguments: argparse.Namespace) -> list[Job]:
    """Returns jobs that compare the kernels' results at full size. They time nothing, so they can run together."""
    return [
        measurement(arguments, f"agreement {precision}", ("agreement",), [(precision, arguments.batch)])
        for precision in arguments.compared
    ]


def measurement(
    arguments: argparse.Namespace,
    name: str,
    suites: Sequence[str],
    at: Sequence[tuple[str, int]],
    *options: str,
    limit: float = math.inf,
    **how,
) -> Job:
    """Returns the job that runs the suites at each precision and batch size of `at`."""
    sizes = [f"{precision}-{batch}" for precision, batch in at]
    scale = [f"--{key}={getattr(arguments, key)}" for key in ("device", "work", "ngf", "batch", "repeats", "seconds")]
    what = ["part", name, "--suites", *suites, "--at", *sizes]
    command = python("-m", "benchmarks.gpu_measure", *what, *scale, *options)
    return Job(name, command, limit, needs=NEEDS, writes=arguments.work / f"{name}.jsonl", **how)


def preparation(arguments: argparse.Namespace) -> Job:
    """Returns the job that prepares the masks for all measurements."""
    how = [f"--{key}={getattr(arguments, key)}" for key in ("device", "work", "ngf", "size", "dataroot")]
    return Job("prepare", python("-m", "benchmarks.gpu_measure", "prepare", *how), 120, needs=NEEDS)


def about(work: Path) -> Path:
    """Returns the path of the file in which `gpu_measure prepare` describes this machine and the masks."""
    return work / "about.json"


def is_file(out: Path) -> bool:
    return out.suffix == ".json"


def wanted(jobs: Sequence[Job], only: Sequence[str]) -> list[Job]:
    return [job for job in jobs if not only or any(fnmatch.fnmatch(job.name, pattern) for pattern in only)]


def saved(arguments: argparse.Namespace, jobs: Sequence[Job], steps: Steps, final: bool = False) -> str:
    """Writes the result file and returns its tables; if `final`, the targets are added as a step."""
    if not about(arguments.work).exists():
        return "(nothing was measured)"
    # These modules load the compiled kernels, which the job `build` makes; so they are not imported at the top.
    from benchmarks import gpu_report as report
    from spade_model.benchmark.results import BenchRun, file_name, newest

    where = json.loads(about(arguments.work).read_text())
    path = arguments.out if is_file(arguments.out) else arguments.out / file_name(where["environment"]["device"])
    names = {job.name for job in jobs}
    results, failed = report.gathered(job.writes for job in jobs if job.writes)
    done = list(steps.done)
    if arguments.only:
        before = report.earlier(path, where["environment"])
        results = newest([*before[0], *results])
        done = [step for step in before[1] if step.name not in {s.name for s in done}] + done
        failed = {part: who for part, who in before[2].items() if part not in names} | failed
    run = BenchRun(where["environment"], where["settings"], results)
    verdicts = report.verdicts(run, arguments.batch, done)
    if final:
        steps.done.append(report.judged(verdicts))
    report.save(path, run, verdicts, done, failed)
    return f"{report.tables(run, verdicts, failed)}\n\nresults: {path}"


if __name__ == "__main__":
    sys.exit(main())
