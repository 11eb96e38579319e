"""The examples run, with few steps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

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
    run("toy_demo.py", "--out", str(tmp_path / "demo"), "--steps", "2")
    result = json.loads((tmp_path / "demo" / "result.json").read_text())
    assert result["agreement of real images"] > 0.97
    assert 0 < result["agreement after training"] < 0.8, "two steps teach nothing: the measure would not be worth much"
    page = (tmp_path / "demo" / "index.html").read_text()
    assert page.count("<img") >= 3 * 16
    assert {"losses.png", "demo.png"} <= {path.name for path in (tmp_path / "demo").iterdir()}
