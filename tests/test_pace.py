"""The pace of a run: what is said of it, and smaller settings where the run would take days."""

from __future__ import annotations

from dataclasses import replace

import pytest

from spade_model.config import default_train_config
from spade_model.pace import Pace, duration, report


def test_the_first_step_is_left_out(monkeypatch):
    clock = iter([100.0, 102.0, 103.0, 107.0, 300.0])
    monkeypatch.setattr("spade_model.pace.time.monotonic", lambda: next(clock))
    pace = Pace()
    assert [pace.step() for _ in range(5)] == [None, None, None, pytest.approx(7 / 3), None]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.2, "1 second"),
        (30, "30 seconds"),
        (119, "119 seconds"),
        (5400, "90 minutes"),
        (86400, "24 hours"),
        (2e5, "2 days"),
    ],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_report_of_a_short_run():
    config = replace(default_train_config("toy"), display_freq=100, save_latest_freq=5000)
    assert report(config, 0.5, 4, 1000) == (
        "0.5 seconds per step: the next sample in 48 seconds, the next checkpoint in 8 minutes, the end in 8 minutes"
    )
    by_time = report(config, 10.0, 4, 1000)
    assert "the next checkpoint in 10 minutes, the end in 3 hours" in by_time
    by_steps = report(replace(config, save_minutes=0.0, no_html=True), 10.0, 4, 1000)
    assert by_steps == "10 seconds per step: the next checkpoint in 3 hours, the end in 3 hours"


def test_report_of_a_run_of_days_proposes_smaller_settings():
    config = default_train_config("coco")
    line = report(config, 10.0, 4, 100_000)
    assert "the end in 12 days. Faster: --crop_size 128 --load_size 143" in line
    assert "--ngf 32 --ndf 32" in line
    assert "--niter 4 (a day)" in line
    assert "--max_steps 8644 (a day)" in report(replace(config, max_steps=100_000), 10.0, 4, 100_000)
