"""Two processes do what one does with the doubled batch."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_train import losses

SCRIPT = Path(__file__).parent / "distributed_step.py"
NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="not run: there is no GPU")
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def recorded(path: Path) -> dict:
    return torch.load(path, weights_only=True)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=NEEDS_GPU)])
def test_two_processes_equal_one_with_the_doubled_batch(tmp_path, device):
    """Gradients of all three networks, of R1 and synchronized batch norm too, and the running statistics."""
    run([sys.executable, str(SCRIPT), str(tmp_path / "one.pt"), "1", device])
    output = run([*TORCHRUN, str(SCRIPT), str(tmp_path / "two.pt"), "1", device])
    # PyTorch's own second derivative of a convolution with one output channel has another stride in that dimension.
    sizes = re.findall(r"bucket view strides.*?grad.sizes\(\) = \[(.*?)\]", output, re.DOTALL)
    assert all(size.startswith("1, ") for size in sizes), f"gradients and parameters differ in layout: {sizes}"
    one, two = recorded(tmp_path / "one.pt"), recorded(tmp_path / "two.pt")
    assert one["gradients"].keys() == two["gradients"].keys()
    for kind in ("gradients", "buffers"):
        largest = max(value.abs().max() for name, value in one[kind].items() if value.is_floating_point())
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, rtol=1e-8, atol=1e-10 * largest.item(), msg=name)


def test_torchrun_trains_and_resumes(tmp_path):
    """The command line under torchrun: stopped and continued, it logs the losses of the uninterrupted run."""
    command = [*TORCHRUN, "-m", "spade_model.cli", "train", "--dataset_mode", "toy", "--crop_size", "32"]
    command += [
        "--max_dataset_size",
        "16",
        "--batch_size",
        "2",
        "--ngf",
        "2",
        "--ndf",
        "2",
        "--no_vgg_loss",
        "--no_html",
    ]
    command += ["--print_freq", "1", "--use_vae", "--z_dim", "4", "--ema_decay", "0.9", "--r1_gamma", "1"]
    whole = run([*command, "--checkpoints_dir", str(tmp_path / "whole"), "--name", "run", "--max_steps", "6"])
    assert whole.count("saved in") == 1, "one process speaks"
    part = [*command, "--checkpoints_dir", str(tmp_path / "part"), "--name", "run"]
    run([*part, "--max_steps", "3"])
    run([*part, "--max_steps", "6", "--continue_train"])
    assert losses(tmp_path / "part" / "run") == losses(tmp_path / "whole" / "run")
    alone = [sys.executable, *command[len(TORCHRUN) :], "--checkpoints_dir", str(tmp_path / "part"), "--name", "run"]
    output = run([*alone, "--max_steps", "8", "--continue_train"])
    assert "step 6, epoch 2: processes 1 instead of 2; the 8 images left of the epoch are shared out anew" in output
    assert [line["epoch"] for line in losses(tmp_path / "part" / "run")] == [1, 1, 1, 1, 2, 2, 2, 2]
