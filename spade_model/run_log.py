"""Logs the losses of a training run: as JSON lines, in a progress bar, and in TensorBoard."""

from __future__ import annotations

import json
import logging
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from tqdm import tqdm

from spade_model.errors import UserError

LOG_FILE = "log.jsonl"

_logger = logging.getLogger("spade_model")


class RunLog:
    """Writes a run's losses to folder/log.jsonl and shows its progress.

    It is a context manager and closes its files at the end.

    Args:
        folder: the run's folder, created if needed.
        total_steps: steps of the whole run, for the bar.
        first_step: number of steps already done. Log lines of later steps, which a crashed or an earlier run left, are
            removed, and hidden in TensorBoard.
        tensorboard: also write event files under folder/tensorboard.
        progress: show a progress bar. If False, or if stderr is not a terminal, `step` and `write` send INFO lines to
            the logger "spade_model" instead.
        quiet: write no files and no output; for all processes but the first.

    Raises:
        UserError: the folder cannot be written, or `tensorboard` is True but the package is not installed.
    """

    def __init__(
        self,
        folder: Path,
        *,
        total_steps: int,
        first_step: int = 0,
        tensorboard: bool = False,
        progress: bool = True,
        quiet: bool = False,
    ) -> None:
        self._path, self._total_steps, self._quiet = folder / LOG_FILE, total_steps, quiet
        self._since, self._new_steps = time.monotonic(), 0
        self._bar: tqdm | None = None
        self._events: Any = None
        if quiet:
            return
        with _disk_errors(self._path):
            folder.mkdir(parents=True, exist_ok=True)
            _drop_after(first_step, self._path)
        if tensorboard:
            self._events = _open_tensorboard(folder / "tensorboard", first_step)
        if progress and sys.stderr is not None and sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=first_step, unit="step", dynamic_ncols=True)

    def step(self, step: int, losses: dict[str, float], **extra: Any) -> None:
        """Logs the losses of a step, and any other JSON values (epoch, learning rate) beside them.

        Numbers that are not finite are null in the log. Raises UserError when the log cannot be written.
        """
        if self._quiet:
            return
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        values = {**extra, **{name: float(value) for name, value in losses.items()}}
        record = {"step": step, "time": now, **{name: _finite(value) for name, value in values.items()}}
        with _disk_errors(self._path), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._events is not None:
            with _disk_errors(self._path.with_name("tensorboard")):
                for name, value in values.items():
                    if isinstance(value, int | float):
                        self._events.add_scalar(name, value, step)
        if self._bar is not None:
            self._bar.set_postfix({name: values[name] for name in losses})
        else:
            shown = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
            _logger.info("step %d/%d%s  %s", step, self._total_steps, self._pace(step), shown)

    def advance(self, n: int = 1) -> None:
        """Counts n more steps, in the progress bar and for the pace in the next log line."""
        self._new_steps += n
        if self._bar is not None:
            self._bar.update(n)

    def _pace(self, step: int) -> str:
        """Returns a text with the seconds per step since the last line and the remaining time at that pace.

        The seconds include everything, such as saving. The text is empty if no step was counted.
        """
        now = time.monotonic()
        seconds, steps = now - self._since, self._new_steps
        self._since, self._new_steps = now, 0
        if not steps:
            return ""
        left = tqdm.format_interval((self._total_steps - step) * seconds / steps)
        return f"  {_short(seconds / steps)} s/step, {left} left"

    def write(self, message: str) -> None:
        """Prints a line above the progress bar, or logs it if there is no bar."""
        if self._bar is not None:
            # tqdm itself ignores a terminal that has gone, but not here.
            with suppress(OSError):
                self._bar.write(message, file=sys.stderr)
        elif not self._quiet:
            _logger.info("%s", message)

    def records(self) -> list[dict[str, Any]]:
        """Returns the log's records, oldest first, without damaged lines. Raises UserError for an unreadable log."""
        if self._quiet:
            return []
        with _disk_errors(self._path), self._path.open("rb") as file:
            return [record for line in file if (record := _parse(line)) is not None]

    def close(self) -> None:
        """Closes the bar and the event files. Raises UserError when the last events cannot be written."""
        if self._bar is not None:
            self._bar.close()
        if self._events is not None:
            with _disk_errors(self._path.with_name("tensorboard")):
                self._events.close()

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _drop_after(last_step: int, path: Path) -> None:
    """Truncates the log after its last complete record with a step <= `last_step`; creates a missing log."""
    with path.open("a+b") as file:
        file.seek(0)
        position = end = 0
        for line in file:
            position += len(line)
            record = _parse(line)
            if record is not None and record["step"] <= last_step:
                end = position
        file.truncate(end)


def _parse(line: bytes) -> dict[str, Any] | None:
    """Returns the record of a line; None if the line is incomplete or not a record."""
    if not line.endswith(b"\n"):
        return None
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _open_tensorboard(folder: Path, first_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"--tensorboard needs a missing package ({error}); pip install tensorboard") from error
    with _disk_errors(folder):
        return SummaryWriter(str(folder), purge_step=first_step + 1)


@contextmanager
def _disk_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"cannot use {path}: {reason}; make its folder writable or free space") from error
