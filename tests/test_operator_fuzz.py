"""No call ends the process, and no operator takes an invalid argument; see operator_fuzz.py and public_fuzz.py."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import spade_kernels as sk

CALLS = 300


def fuzz(*options: object, script: str = "operator_fuzz.py") -> str:
    """Runs the fuzzer and returns its report; it needs a process that has no threads yet."""
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, options)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_calls_with_one_argument_changed(backend):
    if sk.build_info()["backends"][backend] is not None:
        pytest.skip(f"backend {backend}: {sk.build_info()['backends'][backend]}")
    assert fuzz("--calls", CALLS, "--backend", backend).startswith(f"{CALLS} calls: ")


def test_public_calls_with_odd_values():
    assert f"{CALLS} calls: " in fuzz("--calls", CALLS, script="public_fuzz.py")
