"""Training runs for the trials, in processes of their own: 32 x 32 landscapes and networks of a few channels."""

from __future__ import annotations

import subprocess
from pathlib import Path

from command import start
from test_train import assert_same_state, losses

_OPTIONS = [
    *("--dataset_mode", "toy", "--crop_size", "32", "--load_size", "32", "--ngf", "4", "--ndf", "4"),
    *("--batch_size", "2", "--max_dataset_size", "8", "--niter", "100000", "--print_freq", "1"),
    *("--use_vae", "--z_dim", "4", "--ema_decay", "0.9", "--ema_bn_batches", "1"),
    *("--no_vgg_loss", "--no_html", "--device", "cpu"),
]


def begin(folder: Path, steps: int, *options: object, **streams) -> subprocess.Popen:
    """Starts the run folder/run, or continues it from its checkpoint; `options` come last and win.

    stderr is a pipe, and stdout is discarded, unless `streams` says otherwise.
    """
    goes_on = ["--continue_train"] if (folder / "run/latest.safetensors").exists() else _OPTIONS
    run = ["--name", "run", "--checkpoints_dir", folder, "--max_steps", steps]
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, **streams}
    return start(["train", *goes_on, *run, *options], **streams)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end of a process, compares its exit status, and returns its stderr."""
    _, err = process.communicate(timeout=600)
    assert process.returncode == status, f"status {process.returncode} instead of {status}: {err}"
    assert "Traceback" not in err, err
    return err


def whole_run(folder: Path, steps: int, *options: object) -> Path:
    """Trains without an interruption and returns the run's folder."""
    finish(begin(folder, steps, *options))
    return folder / "run"


def assert_same_run(one: Path, other: Path) -> None:
    """Asserts that weights, optimizers, random state, position and all logged losses of two runs are bitwise equal."""
    assert_same_state(one, other)
    assert losses(one) == losses(other)
