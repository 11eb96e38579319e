"""A full disk, data that vanish, a clock that jumps, and two runs of one name."""

from __future__ import annotations

import random
import resource
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import assert_same_state, losses, small_config

from soak.runs import assert_same_run, begin, finish, whole_run
from spade_model import checkpoint, run_log
from spade_model.training import train

_STEPS = 6


def full_disk(folder: Path, count: int) -> dict[str, int]:
    """Limits the size of files so that saving fails: the last state stays, and the run goes on when there is room."""
    whole = whole_run(folder / "whole", _STEPS)
    size = (whole / "latest.safetensors").stat().st_size
    chance = random.Random(0)
    for number in range(count):
        place, limit = folder / str(number), chance.randrange(20_000, size)
        finish(begin(place, 3))
        before = (place / "run/latest.safetensors").read_bytes()

        def limited(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        err = finish(begin(place, _STEPS, preexec_fn=limited), status=2)
        assert "could not save" in err, err
        assert "untouched" in err, err
        assert (place / "run/latest.safetensors").read_bytes() == before
        assert [path.name for path in (place / "run").glob("*.safetensors")] == ["latest.safetensors"]
        assert not list(place.rglob("*.partial"))
        finish(begin(place, _STEPS))
        assert_same_run(whole, place / "run")
        shutil.rmtree(place)
    return {"full disks": count, "runs that ended bitwise equal": count}


def vanished_data(folder: Path, count: int) -> dict[str, int]:
    """Moves the photographs away during training: the run is saved, and goes on when they are back."""
    for kind in ("labels", "images"):
        (folder / kind).mkdir(parents=True)
        for number in range(8):
            pixels = np.full((32, 32), number % 7 if kind == "labels" else 20 * number, dtype=np.uint8)
            Image.fromarray(pixels).save(folder / kind / f"{number}.png")
    options = ["--dataset_mode", "custom", "--label_dir", folder / "labels", "--image_dir", folder / "images"]
    steps, done = 100_000, 0
    for number in range(count):
        place = folder / str(number)
        process = begin(place, steps, *options, "--no_instance", "--num_workers", 2 * (number % 2))
        assert process.stderr is not None
        while (line := process.stderr.readline()) and not line.startswith("step 3/"):
            pass
        (folder / "images").rename(folder / "away")
        err = finish(process, status=2)
        (folder / "away").rename(folder / "images")
        done = checkpoint.load(place / "run/latest.safetensors")["steps"]
        assert f"The run is saved at step {done}" in err, err
        finish(begin(place, done + 3))
        whole = whole_run(folder / f"whole {number}", done + 3, *options, "--no_instance")
        assert_same_run(whole, place / "run")
    return {"vanished data sets": count, "runs that ended bitwise equal": count}


def jumping_clock(folder: Path, steps: int) -> dict[str, int]:
    """Trains while the system's time jumps by years, to and fro. Results and losses equal those without jumps."""
    chance, jumps, clock = random.Random(0), 0, time.time

    def jump() -> float:
        nonlocal jumps
        jumps += 1
        return clock() + chance.uniform(-1e9, 1e9)

    class Jumping(run_log.datetime):
        @classmethod
        def now(cls, tz=None):
            return cls.fromtimestamp(jump(), tz)

    whole = train(small_config(folder / "whole", max_steps=steps))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", jump)
        patch.setattr(run_log, "datetime", Jumping)
        train(small_config(folder / "part", max_steps=steps // 2))
        part = train(small_config(folder / "part", max_steps=steps, continue_train=True))
    assert jumps >= steps
    assert_same_state(whole, part)
    assert losses(whole) == losses(part)
    return {"steps": steps, "jumps": jumps}


def two_at_once(folder: Path, count: int) -> dict[str, int]:
    """Starts two runs of one name together, new and continued: one trains to its end, the other is refused."""
    whole = whole_run(folder / "whole", 2 * _STEPS)
    for number in range(count):
        for steps in (_STEPS, 2 * _STEPS):
            pair = [begin(folder / str(number), steps) for _ in range(2)]
            errors = [process.communicate(timeout=600)[1] for process in pair]
            # The slower process may start after the end of the other one, when no steps are left.
            assert min(process.returncode for process in pair) == 0, errors
            for process, err in zip(pair, errors, strict=True):
                assert process.returncode in (0, 2), err
                assert "Traceback" not in err, err
                refusals = ("another process trains in", "already holds a trained model", "are done")
                assert process.returncode == 0 or any(refusal in err for refusal in refusals), err
        assert_same_run(whole, folder / str(number) / "run")
    return {"pairs": 2 * count, "runs that ended bitwise equal": count}
