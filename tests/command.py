"""Helpers of the command line's tests: the options of a very small run, and the result of a command."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TINY = [
    *("--dataset_mode", "toy", "--crop_size", "32", "--load_size", "32", "--ngf", "2", "--ndf", "2"),
    *("--batch_size", "2", "--max_dataset_size", "4", "--niter", "1", "--print_freq", "1"),
    *("--no_vgg_loss", "--no_html", "--device", "cpu"),
]
"""Two steps on 32 x 32 pixels, in less than a second."""


@dataclass(frozen=True)
class Result:
    """The exit status of a command, and its output."""

    status: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """Everything printed, without the frames and line breaks that the option parser draws."""
        return " ".join((self.out + self.err).replace("│", " ").split())


def assert_refused(result: Result, *fragments: str) -> None:
    """The command ended with status 2 and one message, without a traceback, that holds all the fragments."""
    assert result.status == 2, result
    assert "Traceback" not in result.err
    assert [f for f in fragments if f not in result.message] == [], result.message


def start(arguments: Sequence[object], **streams) -> subprocess.Popen:
    """`spade` as a process of its own."""
    command = [sys.executable, "-m", "spade_model.cli", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=environment, cwd=Path(__file__).parents[1], **streams)
