"""Whatever ends a run early (Ctrl-C, bad data, NaN, a closed pipe), it says so and what was trained is not lost."""

from __future__ import annotations

import fcntl
import os
import pty
import shutil
import signal
import struct
import subprocess
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY, assert_refused, start
from PIL import Image

from spade_model import checkpoint, losses
from spade_model.config import load_config
from spade_model.stopping import STOP_SIGNALS
from spade_model.training import train

REFRESH = 'http-equiv="refresh"'


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "run"))


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen]]:
    """Processes to end with the test, should it fail."""
    started: list[subprocess.Popen] = []
    yield started
    for process in started:
        process.kill()
        process.wait()


def start_training(processes: list[subprocess.Popen], folder: Path, *options: object, **streams) -> subprocess.Popen:
    """Starts a long run and returns its process after the first step."""
    run = ["--name", "run", "--checkpoints_dir", folder, "--niter", "100000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "preexec_fn": react_to_signals, **streams}
    process = start(["train", *TINY, *run, *options], **streams)
    processes.append(process)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step 1/"):
            break
    return process


def react_to_signals() -> None:
    """Undoes what a shell does to the processes that it starts in the background."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_signal_saves_and_the_run_goes_on(spade, tmp_path, processes, number):
    # With the page: the last --no_html counts.
    process = start_training(processes, tmp_path, "--no_no_html")
    assert REFRESH in (tmp_path / "run/web/index.html").read_text()
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    assert f"saved in {tmp_path / 'run'}" in out
    assert f"Go on with: spade train --name run --checkpoints_dir {tmp_path} --continue_train" in err
    assert REFRESH not in (tmp_path / "run/web/index.html").read_text()

    steps = checkpoint.load(tmp_path / "run/latest.safetensors")["steps"]
    assert steps >= 1
    resume = ["--name", "run", "--checkpoints_dir", tmp_path, "--continue_train", "--max_steps", steps + 2]
    assert spade("train", *resume).status == 0
    assert checkpoint.load(tmp_path / "run/latest.safetensors")["steps"] == steps + 2


def test_a_terminal_that_closes_signals_the_whole_group_twice(tmp_path, processes):
    process = start_training(processes, tmp_path, "--num_workers", 1, start_new_session=True)
    for _ in range(2):
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(0.05)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, "Traceback" in err) == (0, False), err
    assert checkpoint.load(tmp_path / "run/latest.safetensors")["steps"] >= 1


def test_a_run_under_nohup_outlives_its_terminal(tmp_path, processes):
    ignore = partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    process = start_training(processes, tmp_path, preexec_fn=ignore)
    assert process.stderr is not None
    process.send_signal(signal.SIGHUP)
    assert [process.stderr.readline().split("/")[0] for _ in range(3)] == ["step 2", "step 3", "step 4"]
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 0


def test_interrupted_before_training(spade, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("spade_model.commands.train", interrupt)
    result = spade("train", *TINY)
    assert (result.status, result.err) == (130, "interrupted\n")


def test_interrupted_while_torch_is_loaded(tmp_path, monkeypatch, processes):
    (tmp_path / "torch.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    # A process that a shell starts in the background would ignore the signal.
    default = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = start(["train", *TINY], stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=default)
    processes.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "interrupted\n")


def nan_loss(results, *arguments, **options):
    return sum(features[-1].sum() for features in results) * float("nan")


@pytest.mark.parametrize("print_freq", [1, 1000])
def test_nan_stops_the_run_and_keeps_the_state_before(spade, run_copy, monkeypatch, print_freq):
    monkeypatch.setattr(losses, "gan_loss", nan_loss)
    before = (run_copy / "latest.safetensors").read_bytes()
    options = ["--niter", "3", "--print_freq", print_freq, "--save_latest_freq", "1"]
    run = ["--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train"]
    result = spade("train", *run, *options)
    what = "GAN is nan" if print_freq == 1 else "is not finite"
    assert_refused(result, "diverged at step 3", what, "The last saved state in", "lower --lr", "--precision fp32")
    assert (run_copy / "latest.safetensors").read_bytes() == before


def test_nan_in_a_fresh_run(spade, tmp_path, monkeypatch):
    monkeypatch.setattr(losses, "gan_loss", nan_loss)
    result = spade("train", *TINY, "--name", "run", "--checkpoints_dir", tmp_path)
    assert_refused(result, "diverged at step 1", "Start again with a lower --lr")


def save_ids(path: Path, value: int) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(np.full((32, 32), value, dtype=np.uint8)).save(path)


@pytest.mark.parametrize(("workers", "ema_decay"), [(0, 0), (0, 0.9), (1, 0)])
def test_bad_file_in_mid_epoch_saves_first(spade, tmp_path, workers, ema_decay):
    """With a moving average, too, whose statistics are taken from the same files before it is saved."""
    for number in range(6):
        save_ids(tmp_path / f"labels/{number}.png", 40 if number == 4 else 1)
        save_ids(tmp_path / f"images/{number}.png", 100)
    data = ["--label_dir", tmp_path / "labels", "--image_dir", tmp_path / "images", "--no_instance"]
    run = ["--name", "run", "--checkpoints_dir", tmp_path / "runs"]
    options = ["--dataset_mode", "custom", "--serial_batches", "--num_workers", workers, "--max_dataset_size", "6"]
    options += ["--ema_decay", ema_decay]
    result = spade("train", *TINY, *run, *data, *options, "--no_no_html")
    fix = [
        "Set --label_nc to at least 41",
        "`spade doctor` with the same options",
        "saved at step 2",
        "correct the data",
        "--continue_train",
    ]
    assert_refused(result, "labels/4.png", "id 40", "x=0, y=0", *fix)
    assert REFRESH not in (tmp_path / "runs/run/web/index.html").read_text()
    save_ids(tmp_path / "labels/4.png", 1)
    assert spade("train", *run, "--continue_train").status == 0
    assert checkpoint.load(tmp_path / "runs/run/latest.safetensors")["steps"] == 3


def test_photographs_of_another_size(spade, tmp_path):
    for number in range(2):
        save_ids(tmp_path / f"labels/{number}.png", 1)
        save_ids(tmp_path / f"images/{number}.png", 100)
    data = ["--label_dir", tmp_path / "labels", "--image_dir", tmp_path / "images", "--no_instance"]
    options = ["--dataset_mode", "custom", "--preprocess_mode", "none", "--crop_size", "64"]
    result = spade("train", *TINY, *data, *options, "--checkpoints_dir", tmp_path / "runs")
    assert_refused(result, "is 32x32 pixels", "makes 64x64", "--crop_size", "--preprocess_mode")


def test_precision_can_change_from_run_to_run(spade, run_copy):
    for epochs, precision in enumerate(["fp16", "fp32", "fp16"], start=2):
        run = ["--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train"]
        assert spade("train", *run, "--niter", epochs, "--precision", precision).status == 0


def test_out_of_memory(spade, monkeypatch):
    def exhaust(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nDetails")

    monkeypatch.setattr("spade_model.commands.train", exhaust)
    assert_refused(spade("train", *TINY), "Tried to allocate 2 GiB.", "--batch_size", "--crop_size", "bf16")


def test_training_in_a_thread(run_copy):
    """Where no signal handlers can be set."""
    config = replace(load_config(run_copy / "config.json"), name="other", checkpoints_dir=str(run_copy.parent))
    thread = threading.Thread(target=train, args=(config,))
    thread.start()
    thread.join()
    assert checkpoint.load(run_copy.parent / "other/latest.safetensors")["steps"] == 2


@pytest.mark.parametrize("arguments", [["doctor"], ["train", "--help"]])
def test_output_that_nobody_reads(processes, arguments):
    """The reader of the output has gone before the first line, like that of `spade ... | head`."""
    with closed_pipe() as pipe:
        process = start(arguments, stdout=pipe, stderr=subprocess.PIPE)
    processes.append(process)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")


@contextmanager
def closed_pipe() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


def close_streams() -> None:
    for number in (0, 1, 2):
        os.close(number)


def open_for_reading() -> None:
    for number in (1, 2):
        os.dup2(os.open(os.devnull, os.O_RDONLY), number)


STREAMS: dict[str, Callable[[], object]] = {"closed": close_streams, "for reading only": open_for_reading}


@pytest.mark.parametrize("streams", ["broken pipe", *STREAMS])
def test_training_does_not_depend_on_its_output(tmp_path, processes, streams):
    with closed_pipe() as pipe:
        output = {"stdout": pipe, "stderr": pipe, "preexec_fn": STREAMS.get(streams)}
        process = start(["train", *TINY, "--name", "run", "--checkpoints_dir", tmp_path], **output)
    processes.append(process)
    assert process.wait(timeout=60) == 0
    assert checkpoint.load(tmp_path / "run/latest.safetensors")["steps"] == 2
    refused = start(["train", "--lr", "-1"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    processes.append(refused)
    assert refused.wait(timeout=60) == 2


def test_a_terminal_that_has_gone(tmp_path, processes):
    """The progress bar is on a terminal whose other end is closed in mid-run."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("4H", 24, 80, 0, 0))
    run = ["--name", "run", "--checkpoints_dir", tmp_path, "--niter", 20]
    process = start(["train", *TINY, *run], stdout=theirs, stderr=theirs)
    processes.append(process)
    os.close(theirs)
    while b"0/40" not in os.read(ours, 1000):
        pass
    os.close(ours)
    assert process.wait(timeout=60) == 0
    assert checkpoint.load(tmp_path / "run/latest.safetensors")["steps"] == 40


def test_a_console_that_lacks_the_characters_of_a_path(tmp_path, monkeypatch, processes):
    monkeypatch.setenv("PYTHONIOENCODING", "cp1252")
    runs = tmp_path / "\u30de\u30b9\u30af"
    for arguments, status in ((["train", *TINY, "--name", "run"], 0), (["train", *TINY, "--name", "run"], 2)):
        command = [*arguments, "--checkpoints_dir", runs]
        process = start(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        processes.append(process)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, "Traceback" in err, "Error" in err) == (status, False, False), err
        assert r"\u30de\u30b9\u30af" in (err if status else out)


def test_debugging_shows_the_traceback(spade, monkeypatch):
    monkeypatch.setenv("SPADE_DEBUG", "1")
    result = spade("train", *TINY, "--lr", "-1")
    assert result.status == 2
    assert "Traceback" in result.err
    assert result.err.endswith("must be a finite number greater than 0\n")
