"""The run log: valid JSON whatever the losses are, the right lines after a resume, and clear errors."""

from __future__ import annotations

import io
import json
import logging
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from spade_model.errors import UserError
from spade_model.run_log import RunLog

FULL_DISK = Path("/dev/full")


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def open_terminal(monkeypatch) -> Terminal:
    """Called in the test itself: between fixtures and tests, pytest puts its own stream back."""
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    return stream


def lines(folder) -> list[dict]:
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in (folder / "log.jsonl").read_text().splitlines()]


def write_steps(folder, *steps: int, first_step: int = 0) -> None:
    with RunLog(folder, total_steps=100, first_step=first_step) as log:
        for step in steps:
            log.step(step, {"GAN": step / 2})


def test_every_step_is_a_line(tmp_path):
    with RunLog(tmp_path / "new" / "run", total_steps=10) as log:
        log.step(1, {"GAN": 0.5, "D_Fake": 1.0}, epoch=3, lr=1e-4)
        log.step(2, {"GAN": 0.25})
        assert log.records() == lines(tmp_path / "new" / "run")
    first, second = lines(tmp_path / "new" / "run")
    time = datetime.fromisoformat(first.pop("time"))
    assert time.utcoffset() == timedelta(0)
    assert first == {"step": 1, "epoch": 3, "lr": 1e-4, "GAN": 0.5, "D_Fake": 1.0}
    assert (second["step"], second["GAN"]) == (2, 0.25)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_is_null(tmp_path, value):
    with RunLog(tmp_path, total_steps=10) as log:
        log.step(1, {"GAN": value}, lr=value)
        (record,) = log.records()
    assert record["GAN"] is None
    assert record["lr"] is None
    assert lines(tmp_path) == [record]


def test_a_resumed_run_drops_the_crashed_tail(tmp_path):
    write_steps(tmp_path, 10, 20, 30, 40)
    write_steps(tmp_path, 30, first_step=25)
    assert [record["step"] for record in lines(tmp_path)] == [10, 20, 30]


def test_a_new_run_starts_a_new_log(tmp_path):
    write_steps(tmp_path, 10, 20)
    write_steps(tmp_path, 5)
    assert [record["step"] for record in lines(tmp_path)] == [5]


@pytest.mark.parametrize("torn", ['{"step": 30, "GA', '{"step": 15}', "\x00\x00\x00", '{"step": 30}\n{"st'])
def test_a_torn_last_line_is_dropped(tmp_path, torn):
    write_steps(tmp_path, 10, 20)
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write(torn)
    write_steps(tmp_path, 30, first_step=20)
    assert [record["step"] for record in lines(tmp_path)] == [10, 20, 30]


def test_damaged_lines_in_the_middle_are_left_out(tmp_path):
    good = b'{"step": 1, "GAN": 1.0}\n'
    (tmp_path / "log.jsonl").write_bytes(good + b'[1]\n"x"\n{"GAN": 1}\n\xff\xfe\n\n' + good.replace(b"1,", b"2,"))
    with RunLog(tmp_path, total_steps=10, first_step=5) as log:
        assert [record["step"] for record in log.records()] == [1, 2]


def test_without_a_terminal_steps_and_messages_go_to_the_logger(tmp_path, caplog, capfd):
    with caplog.at_level(logging.INFO, "spade_model"), RunLog(tmp_path, total_steps=10) as log:
        log.step(4, {"GAN": 0.123456}, epoch=2)
        log.advance()
        log.write("saved 100%")
    assert [record.getMessage() for record in caplog.records] == ["step 4/10  epoch 2  GAN 0.1235", "saved 100%"]
    assert capfd.readouterr() == ("", "")


def test_without_a_terminal_lines_have_the_pace(tmp_path, monkeypatch, caplog):
    clock = iter([100.0, 104.0, 205.0])
    monkeypatch.setattr("spade_model.run_log.time.monotonic", lambda: next(clock))
    with caplog.at_level(logging.INFO, "spade_model"), RunLog(tmp_path, total_steps=46, first_step=2) as log:
        for step, steps in ((10, 8), (20, 10)):
            log.advance(steps)
            log.step(step, {"GAN": 1.0})
    assert [record.getMessage() for record in caplog.records] == [
        "step 10/46  0.5 s/step, 00:18 left  GAN 1",
        "step 20/46  10.1 s/step, 04:22 left  GAN 1",
    ]


def test_progress_off_shows_no_bar_on_a_terminal(tmp_path, monkeypatch):
    terminal = open_terminal(monkeypatch)
    with RunLog(tmp_path, total_steps=10, progress=False) as log:
        log.advance()
    assert terminal.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_losses(tmp_path, monkeypatch, caplog):
    terminal = open_terminal(monkeypatch)
    with caplog.at_level(logging.INFO, "spade_model"), RunLog(tmp_path, total_steps=10, first_step=5) as log:
        log.advance(2)
        log.step(7, {"GAN": 0.5})
        log.write("saved the latest state")
    shown = terminal.getvalue()
    assert "7/10" in shown
    assert "GAN=0.5" in shown
    assert "saved the latest state\n" in shown
    assert not caplog.records


def test_quiet_leaves_no_trace(tmp_path, monkeypatch, caplog):
    terminal = open_terminal(monkeypatch)
    with (
        caplog.at_level(logging.INFO),
        RunLog(tmp_path / "run", total_steps=10, tensorboard=True, quiet=True) as log,
    ):
        log.step(1, {"GAN": 0.5})
        log.advance()
        log.write("hello")
        assert log.records() == []
    assert list(tmp_path.iterdir()) == []
    assert terminal.getvalue() == ""
    assert not caplog.records


def scalars(folder) -> dict[str, list[tuple[int, float]]]:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = reader.EventAccumulator(str(folder / "tensorboard")).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_the_losses_and_forgets_a_crashed_tail(tmp_path):
    pytest.importorskip("tensorboard")
    with RunLog(tmp_path, total_steps=10, tensorboard=True) as log:
        for step in (1, 2, 3):
            log.step(step, {"GAN": step / 2}, stage="warm-up", lr=0.5)
    with RunLog(tmp_path, total_steps=10, first_step=2, tensorboard=True) as log:
        log.step(3, {"GAN": 8.0}, lr=0.5)
    assert scalars(tmp_path) == {"GAN": [(1, 0.5), (2, 1.0), (3, 8.0)], "lr": [(1, 0.5), (2, 0.5), (3, 0.5)]}


def test_missing_tensorboard_is_explained(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        RunLog(tmp_path, total_steps=10, tensorboard=True)


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"file/run/log\.jsonl"):
        RunLog(tmp_path / "file" / "run", total_steps=10)


@pytest.mark.skipif(not FULL_DISK.exists(), reason="needs a device that is always full")
def test_a_full_disk(tmp_path):
    with RunLog(tmp_path, total_steps=10) as log:
        (tmp_path / "log.jsonl").unlink()
        (tmp_path / "log.jsonl").symlink_to(FULL_DISK)
        with pytest.raises(UserError, match=r"log\.jsonl: No space left on device"):
            log.step(1, {"GAN": 0.5})
