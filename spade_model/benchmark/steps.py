"""Runs commands with time limits and records their outcomes. This module imports only the standard library."""

from __future__ import annotations

import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

PASSED, FAILED, NOT_RUN = "passed", "FAILED", "not run"
ALONE, TOGETHER, MEASUREMENT = "alone", "together", "measurement"
_SHOWN = 40  # number of output lines that are shown of a failed step
_POLL = 0.2  # seconds


@dataclass(frozen=True)
class Step:
    """The outcome of a job: its status is PASSED, FAILED or NOT_RUN, and `detail` gives the reason."""

    name: str
    status: str
    seconds: float
    detail: str


def by_exit_status(status: int, output: str) -> tuple[str, str]:
    """Returns PASSED for exit status 0, otherwise FAILED, and a detail with the last line of the output."""
    lines = output.strip().splitlines()
    last = lines[-1] if lines else "(no output)"
    return (PASSED, last) if status == 0 else (FAILED, f"exit status {status}: {last}")


@dataclass(frozen=True)
class Job:
    """A command to run.

    Attributes:
        limit: seconds after which the command and all processes it started are killed.
        stage: ALONE jobs run first, one after the other; then all TOGETHER jobs at once; then each MEASUREMENT.
        judge: maps exit status and output to the status and detail of the step.
        may_be_cut: if the time limit ends the job, its status is NOT_RUN instead of FAILED.
        needs: modules that must be installed; otherwise the job does not run.
        writes: the file to which the command writes results.
        after: name of a job; this one runs only if that one passed.
        unless: name of a job; this one runs only if that one did not pass.
        least: the job starts only if at least this many seconds are left, not counting `keep`.
        keep: seconds that the job must leave for later jobs.
    """

    name: str
    command: Sequence[str]
    limit: float
    environment: Mapping[str, str] = field(default_factory=dict)
    judge: Callable[[int, str], tuple[str, str]] = by_exit_status
    may_be_cut: bool = False
    needs: tuple[str, ...] = ()
    stage: str = ALONE
    writes: Path | None = None
    after: str = ""
    unless: str = ""
    least: float = 5.0
    keep: float = 0.0

    def is_due(self, passed: Collection[str]) -> bool:
        """Returns True if the names of the passed jobs satisfy `after` and `unless`."""
        return (not self.after or self.after in passed) and self.unless not in passed


class Steps:
    """Runs jobs one after the other or together, within a total time.

    Args:
        folder: folder for the output of each job, `<name>.log`.
        log: file to which the output of all jobs is appended.
        root: working directory of the jobs.
        seconds: total time for all jobs, from now on.

    Attributes:
        done: the steps of the finished jobs, in the order in which they ended.
    """

    def __init__(self, folder: Path, log: Path, root: Path, seconds: float):
        self.folder, self.log, self.root = folder, log, root
        self.done: list[Step] = []
        self._end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")

    @property
    def left(self) -> float:
        """The number of seconds that are left of the total time."""
        return self._end - time.monotonic()

    @property
    def passed(self) -> list[str]:
        """The names of the steps that passed."""
        return [step.name for step in self.done if step.status == PASSED]

    def run(self, *jobs: Job) -> None:
        """Runs the jobs at the same time, and waits for them. Jobs for which too little time is left are not run."""
        running = []
        for job in jobs:
            missing = [name for name in job.needs if importlib.util.find_spec(name) is None]
            if missing:
                self._finish(Step(job.name, NOT_RUN, 0.0, f"needs {', '.join(missing)}"))
            elif self.left - job.keep < job.least:
                self._finish(Step(job.name, NOT_RUN, 0.0, "no time left"))
            else:
                running.append(_Running(job, self.folder, self.root, min(job.limit, self.left - job.keep)))
        while running:
            time.sleep(_POLL)
            for one in [one for one in running if one.is_over()]:
                running.remove(one)
                step, output = one.result()
                with self.log.open("a") as file:
                    file.write(f"==== {step.name}: {step.status} in {step.seconds:.0f} s\n{output}\n")
                self._finish(step, output)

    def _finish(self, step: Step, output: str = "") -> None:
        self.done.append(step)
        if step.status == FAILED:
            print(*output.splitlines()[-_SHOWN:], sep="\n")
        print(f"{step.name}: {step.status} in {step.seconds:.0f} s: {step.detail}", flush=True)


class _Running:
    def __init__(self, job: Job, folder: Path, root: Path, limit: float):
        self._job, self._limit, self._started, self._was_cut = job, limit, time.monotonic(), False
        self._log = folder / f"{re.sub('[^0-9a-z]+', '-', job.name.lower())}.log"
        with self._log.open("wb") as file:
            self._process = subprocess.Popen(
                job.command,
                cwd=root,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **job.environment},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def is_over(self) -> bool:
        if self._process.poll() is not None:
            return True
        if time.monotonic() - self._started < self._limit:
            return False
        self._was_cut = True
        # The whole process group is killed, because compilers that the job started would go on.
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        return True

    def result(self) -> tuple[Step, str]:
        seconds, output = time.monotonic() - self._started, self._log.read_text(errors="replace")
        if self._was_cut:
            status = NOT_RUN if self._job.may_be_cut else FAILED
            why = f"stopped after {seconds:.0f} s: {by_exit_status(0, output)[1]}"
        else:
            status, why = self._job.judge(self._process.returncode, output)
        return Step(self._job.name, status, round(seconds, 1), why), output


def table(steps: Sequence[Step]) -> str:
    """Returns one aligned line for each step."""
    width = max((len(step.name) for step in steps), default=0)
    return "\n".join(f"{s.name:{width}}  {s.status:7}  {s.seconds:5.0f} s  {s.detail[:110]}" for s in steps)


def python(*arguments: object) -> list[str]:
    """Returns a command that runs this Python interpreter with the arguments."""
    return [sys.executable, *map(str, arguments)]
