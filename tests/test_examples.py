"""The examples run, with few steps."""

from __future__ import annotations

import json
import re
import runpy
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from spade_model.trainer import Trainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_drop_in():
    lines = dict(line.rsplit("  ", 1) for line in run("drop_in.py").splitlines())
    assert 0 < float(lines["largest difference    "]) < 1e-4, "exactly 0: the layer was compared with itself"
    distinct = int(lines["distinct 5x5 windows  "].split()[0])
    assert 0 < distinct < 128 * 128 / 4


def test_accelerate():
    text = run("accelerate.py")
    assert text.count("residual block") == 2
    assert "left alone" not in text
    differences = re.findall(r"largest difference  (\S+), frozen (\S+)", text)
    assert len(differences) == 3
    assert all(float(value) < 1e-5 for pair in differences for value in pair)


def test_toy_demo(tmp_path):
    text = run("toy_demo.py", "--out", str(tmp_path / "demo"), "--steps", "2")
    assert (
        len(re.findall(r"^step 2: .* seconds per step, agreement 0\.\d{3}, at most \d+ seconds left$", text, re.M)) == 1
    )
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["agreement of real images"] > 0.97
    assert 0 < result["agreement after training"] < 0.8, "two steps teach nothing: the measure would not be worth much"
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("<img") >= 3 * 16
    assert {"losses.png", "demo.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}


@pytest.fixture
def stages(tmp_path, monkeypatch):
    """Returns the demo's training, which measures the given values one after the other, and the list of its lines."""
    demo = runpy.run_path(str(EXAMPLES / "toy_demo.py"))
    train_in_stages, config = demo["train_in_stages"], demo["demo_config"](tmp_path)
    small = replace(config, data=replace(config.data, batch_size=1), model=replace(config.model, ngf=2, ndf=2))
    monkeypatch.setitem(train_in_stages.__globals__, "FIRST_STEPS", 2)

    def call(agreements, *, stage_seconds=0.001, enough=0.9, seconds=100.0, most_steps=0):
        monkeypatch.setitem(train_in_stages.__globals__, "STAGE_SECONDS", stage_seconds)
        values = iter(agreements)
        return train_in_stages(small, lambda model: next(values), enough, seconds, most_steps)

    return call


def test_toy_demo_ends_at_the_first_agreement_that_is_enough(stages, capsys):
    result = stages([0.5, 0.89, 0.9, 0.1])
    assert result["steps"] == 2 + 1 + 1, "stages of a thousandth of a second have one step"
    assert result["training ended by"] == "0.9 agreement reached"
    assert result["agreement after training"] == 0.9
    assert re.findall(r"^step (\d+): .* agreement ([\d.]+)", capsys.readouterr().out, re.M) == [
        ("2", "0.500"),
        ("3", "0.890"),
        ("4", "0.900"),
    ]


def test_toy_demo_ends_when_its_time_is_used_up(stages):
    result = stages([0.5, 0.1], seconds=0.01)
    assert result["steps"] == 2
    assert result["training ended by"] == "the limit of 0.01 seconds, before 0.9 agreement"
    assert result["agreement after training"] == 0.5


def test_toy_demo_ends_after_the_steps_that_it_may_take(stages):
    result = stages([0.5, 0.6, 0.7], most_steps=5, stage_seconds=1000)
    assert result["steps"] == 5
    assert result["training ended by"] == "the limit of 5 steps, before 0.9 agreement"
    assert result["agreement after training"] == 0.6


def test_toy_demo_ends_when_it_is_interrupted(stages, monkeypatch):
    step = Trainer.step

    def interrupted_step(trainer, batches):
        if trainer.steps == 3:
            signal.raise_signal(signal.SIGINT)
        return step(trainer, batches)

    monkeypatch.setattr(Trainer, "step", interrupted_step)
    # Workers of pytest-xdist ignore SIGINT, and training respects that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = stages([0.5, 0.6], stage_seconds=1000, most_steps=50)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result["steps"] == 4
    assert result["training ended by"] == "an interruption, before 0.9 agreement"
    assert result["agreement after training"] == 0.6


@pytest.mark.parametrize(("option", "value"), [("--agreement", "92"), ("--seconds", "nan"), ("--steps", "-1")])
def test_toy_demo_refuses_values_out_of_range(tmp_path, monkeypatch, capsys, option, value):
    monkeypatch.setattr(sys, "argv", ["toy_demo.py", "--out", str(tmp_path / "demo"), option, value])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EXAMPLES / "toy_demo.py"), run_name="__main__")
    assert f"error: {option} {value}" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
