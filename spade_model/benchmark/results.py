"""Measured values: what was measured, on what, how, and the median with its 20th and 80th percentile."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from spade_model.errors import UserError
from spade_model.files import replacing

EVAL = "generator eval"
TRAINING = "generator forward + backward"
STEP = "training step"
SAVED = "saved for backward by SPADE layers"
PEAK = "peak memory of a training step"
INDEX = "window indexes, one thread"
LAYER = "layer forward"
LAYER_TRAINING = "layer forward + backward"
DENSE = "layer forward, dense condition"
ALL_LAYERS = "all 18"
"""The case of layer suites that is the sum over the generator's layers."""


@dataclass(frozen=True)
class Result:
    """One line of a table.

    Attributes:
        suite: what was measured. case: on which masks or shape. provider: how.
        p20, p50, p80: in `unit`, "ms" or "MB" (1e6 bytes), over `count` values.
        extra: other numbers about the case, such as the bytes an operator moves.
    """

    suite: str
    case: str
    provider: str
    unit: str
    p20: float
    p50: float
    p80: float
    count: int
    extra: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(
        cls, suite: str, case: str, provider: str, values: Sequence[float], unit: str = "ms", **extra: float
    ) -> Result:
        """The percentiles of measured values, interpolated between neighbours."""
        p20, p50, p80 = (float(f"{value:.5g}") for value in np.percentile(values, [20, 50, 80]))
        return cls(suite, case, provider, unit, p20, p50, p80, len(values), extra)


@dataclass(frozen=True)
class BenchRun:
    """Results that were taken together: only these may be divided by each other.

    Attributes:
        environment: see `environment.environment`.
        settings: width, channels, number of masks, and their fraction of distinct windows by kind (the main one first)
            and resolution.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result]

    def find(self, suite: str, case: str, provider: str) -> Result | None:
        wanted = (suite, case, provider)
        return next((r for r in self.results if (r.suite, r.case, r.provider) == wanted), None)

    @property
    def main_masks(self) -> str:
        """The kind of masks that everything is measured on: "real", or the name of a data set without files."""
        return next(iter(self.settings["distinct windows"]))


def save_runs(runs: Iterable[BenchRun], path: Path) -> None:
    """Writes JSON. Raises UserError when the file cannot be written."""
    try:
        with replacing(path) as temporary:
            temporary.write_text('{"runs": [' + ",\n".join(map(_text, runs)) + "]}\n")
    except OSError as error:
        raise UserError(f"cannot write the results to {path}: {error.strerror}") from error


def load_runs(path: Path) -> list[BenchRun]:
    """Reads what `save_runs` wrote. Raises UserError for a file that is missing or holds something else."""
    try:
        content = json.loads(path.read_text())
        return [BenchRun(**{**run, "results": [Result(**r) for r in run["results"]]}) for run in content["runs"]]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold results of `spade bench` or `make bench`: {error}") from error


def _text(run: BenchRun) -> str:
    """JSON with one line for each result: such files are read and compared by people, too."""
    lines = ",\n".join(json.dumps(asdict(result)) for result in run.results)
    where, what = json.dumps(run.environment, indent=1), json.dumps(run.settings, indent=1)
    return f'{{"environment": {where},\n"settings": {what},\n"results": [\n{lines}\n]}}'
