"""`kill -9` at random moments."""

from __future__ import annotations

import os
import random
import subprocess
import time
from pathlib import Path

from soak.runs import assert_same_run, begin, finish, whole_run

# Orphaned workers of a data loader look for their parent every five seconds.
_ORPHANS_END_WITHIN = 20.0


def kills(folder: Path, count: int, steps: int = 60) -> dict[str, int]:
    """Kills runs `count` times, with 0 and 2 workers in turn; each is resumed and ends like an uninterrupted run.

    The state is saved after every one of `steps` steps. A quarter of the kills comes while a process starts, a quarter
    at any time after its first step, and half as soon as a temporary file is seen.
    """
    moments, done, runs, in_save, groups = random.Random(0), 0, 0, 0, []
    whole = whole_run(folder / "whole", steps, "--save_latest_freq", 1)
    while done < count:
        place, finished = folder / f"run {runs}", False
        options = ["--save_latest_freq", 1, "--num_workers", 2 * (runs % 2)]
        while done < count and not finished:
            process = begin(place, steps, *options, start_new_session=True)
            _await_moment(process, place, moments)
            finished = process.poll() is not None
            if finished:
                finish(process)
            else:
                process.kill()
                process.communicate()
                groups.append(process.pid)
                done += 1
                in_save += bool(list(place.rglob("*.partial")))
        finish(begin(place, steps, *options))
        assert not list(place.rglob("*.partial")), "temporary files of killed saves stay"
        assert_same_run(whole, place / "run")
        runs += 1
    deadline = time.monotonic() + _ORPHANS_END_WITHIN
    while (alive := [group for group in groups if _exists(group)]) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not alive, f"processes of groups {alive} outlive their run"
    return {"kills": done, "kills while a file was written": in_save, "runs that ended bitwise equal": runs}


def _await_moment(process: subprocess.Popen, place: Path, moments: random.Random) -> None:
    kind = moments.choice(("start", "step", "save", "save"))
    if kind == "start":
        time.sleep(4 * moments.random())
        return
    assert process.stderr is not None
    while (line := process.stderr.readline()) and not line.startswith("step "):
        pass
    time.sleep(moments.random())
    while kind == "save" and process.poll() is None and not list((place / "run").glob("*.partial")):
        time.sleep(0.001)


def _exists(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
