"""Times training steps beside busy processes, with threads of OpenMP that wait actively (the default) and passively.

    python -m benchmarks.busy [--repeats 3] [--out folder]

The policy holds for a whole process, so each measurement is a process of its own, in which the steps of this package
and of the eager stock network take turns. The processes of all policies take turns, too.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from spade_model.benchmark.clock import interleave
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import bench_masks, coco_or_toy
from spade_model.benchmark.results import STEP, BenchRun, Result, file_name, save_runs
from spade_model.benchmark.training import step_run

PROVIDERS = ("eager", "ours")
POLICIES = {"active waiting": {}, "passive waiting": {"OMP_WAIT_POLICY": "PASSIVE"}}
BUSY = (0, 1, 2)


def measure_here(size: int, ngf: int, steps: int) -> dict[str, list[float]]:
    """Returns the milliseconds of each provider's steps in this process."""
    ((mask,),) = bench_masks(coco_or_toy("", size), 1, every_kind=False).values()
    runs = {name: step_run(name, mask, ngf) for name in PROVIDERS}
    interleave(runs, [mask], 2)
    return interleave(runs, [mask], steps)


def measure(size: int, ngf: int, steps: int, repeats: int) -> Iterator[Result]:
    """Yields one result for each number of busy processes, policy and provider."""
    command = [sys.executable, "-m", "benchmarks.busy", "--here", f"--size={size}", f"--ngf={ngf}", f"--steps={steps}"]
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    for count in BUSY:
        times: dict[tuple[str, str], list[float]] = {}
        with _busy(count):
            for _ in range(repeats):
                for policy, variables in POLICIES.items():
                    done = subprocess.run(command, env=others | variables, capture_output=True, check=True, text=True)
                    for provider, values in json.loads(done.stdout).items():
                        times.setdefault((policy, provider), []).extend(values)
        for (policy, provider), values in times.items():
            yield Result.of(STEP, f"{count} busy processes, {policy}", provider, values)


@contextlib.contextmanager
def _busy(count: int) -> Iterator[None]:
    """Within this context, so many other processes compute all the time."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def table(results: list[Result]) -> str:
    """Returns the medians in milliseconds as a markdown table."""
    found = {(r.case, r.provider): r.p50 for r in results}
    lines = [f"| beside | {' | '.join(PROVIDERS)} |", "|---" * (1 + len(PROVIDERS)) + "|"]
    for case in dict.fromkeys(r.case for r in results):
        lines.append(f"| {case} | " + " | ".join(f"{found[case, name]:.0f}" for name in PROVIDERS) + " |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=128, help="side of the images")
    parser.add_argument("--ngf", type=int, default=16, help="width of generator and discriminator")
    parser.add_argument("--steps", type=int, default=8, help="steps of each provider in a process")
    parser.add_argument("--repeats", type=int, default=3, help="processes for each number of busy ones and policy")
    parser.add_argument("--out", type=Path, help="folder in which the result file is written")
    parser.add_argument("--here", action="store_true", help="measure in this process and print JSON")
    arguments = parser.parse_args(argv)
    if arguments.here:
        print(json.dumps(measure_here(arguments.size, arguments.ngf, arguments.steps)))
        return
    results = list(measure(arguments.size, arguments.ngf, arguments.steps, arguments.repeats))
    print(table(results))
    if arguments.out:
        where = environment()
        path = arguments.out / ("busy-" + file_name("{device} {threads} threads".format(**where)))
        settings = {
            "size": arguments.size,
            "ngf": arguments.ngf,
            "steps": arguments.steps,
            "repeats": arguments.repeats,
        }
        save_runs([BenchRun(where, settings, results)], path)
        print(f"written to {path}")


if __name__ == "__main__":
    main()
