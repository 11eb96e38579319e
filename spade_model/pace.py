"""The pace of a training run, and texts about when its samples, its checkpoints and its end come."""

from __future__ import annotations

import math
import time

from spade_model.config import TrainConfig

_DAY = 24 * 3600.0
_LONG = 2 * _DAY
# Runs with smaller images or networks than these learn little.
_LEAST_CROP, _LEAST_WIDTH = 128, 32


class Pace:
    """Measures the seconds per step over a few steps. The first step, which compiles and allocates, is left out.

    Args:
        steps: number of steps to measure.
    """

    def __init__(self, steps: int = 3) -> None:
        self._steps, self._seen, self._started = steps, 0, 0.0

    def step(self) -> float | None:
        """Counts a step that has just ended. Returns the seconds per step once, when enough steps were measured."""
        now, self._seen = time.monotonic(), self._seen + 1
        if self._seen == 1:
            self._started = now
        return (now - self._started) / self._steps if self._seen == self._steps + 1 else None


def report(config: TrainConfig, seconds: float, step: int, total_steps: int) -> str:
    """Returns a line about the pace, the next sample, the next checkpoint and the end, and for long runs some advice.

    Args:
        seconds: seconds per step.
        step: number of steps done. total_steps: number of the run's last step.
    """

    def wait(every: int) -> float:
        """Returns the seconds until the next step that is a multiple of `every`, or the last one."""
        return (min(step - step % every + every, total_steps) - step) * seconds

    events = [] if config.no_html else [f"the next sample in {duration(wait(config.display_freq))}"]
    save = wait(config.save_latest_freq)
    if config.save_minutes:
        save = min(save, max(seconds, config.save_minutes * 60))
    left = (total_steps - step) * seconds
    events += [f"the next checkpoint in {duration(save)}", f"the end in {duration(left)}"]
    line = f"{seconds:.2g} seconds per step: {', '.join(events)}"
    advice = _smaller(config, seconds, step, total_steps) if left > _LONG else []
    if advice:
        line += f". Faster: {', '.join(advice)}; sizes and widths need a new run with another --name"
    return line


def duration(seconds: float) -> str:
    """Returns a duration in the largest unit of which it has at least two, such as "90 minutes"."""
    for unit, length in (("days", _DAY), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{math.ceil(seconds)} second{'' if math.ceil(seconds) == 1 else 's'}"


def _smaller(config: TrainConfig, seconds: float, step: int, total_steps: int) -> list[str]:
    """Returns options for a faster run: half the size and width, unless too little is learned then; fewer epochs."""
    data, model, options = config.data, config.model, []
    if data.crop_size >= 2 * _LEAST_CROP:
        options.append(f"--crop_size {data.crop_size // 2} --load_size {data.load_size // 2} (a quarter of the pixels)")
    if model.ngf >= 2 * _LEAST_WIDTH:
        options.append(f"--ngf {model.ngf // 2} --ndf {max(1, model.ndf // 2)} (about a quarter of the arithmetic)")
    steps = step + int(_DAY / seconds)
    epochs = steps * (config.niter + config.niter_decay) // total_steps
    if config.max_steps == total_steps:
        options.append(f"--max_steps {steps} (a day)")
    elif 1 <= epochs < config.niter:
        options.append(f"--niter {epochs} (a day)")
    return options
