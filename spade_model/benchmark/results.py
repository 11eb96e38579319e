"""The results of benchmarks, and the files that hold them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
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
INDEX_GROUPS, LABEL_MAP = "window indexes with groups", "label map of labels"
OPERATOR, BANDWIDTH, PRODUCTS = "operator", "bandwidth", "products"
GPU_PEAK, GPU_INDEX, GPU_CLOCK = "peak memory, generator forward + backward", "window indexes", "clock"
ALL_LAYERS = "all 18"
"""The case of layer suites that holds the sum over all 18 SPADE layers of the generator."""
FAILURES = "failed"
"""The key of the providers that failed, in result files."""


@dataclass(frozen=True)
class Result:
    """The median and percentiles of one measured quantity.

    Attributes:
        suite: name of the quantity, such as EVAL.
        case: the kind of masks, or the shape, that it was measured on.
        provider: name of the network, layer or kernel that was measured (see `providers`).
        unit: "ms", "MB" (1e6 bytes) or "MHz".
        p20, p50, p80: the 20th, 50th and 80th percentile of `count` values.
        extra: other numbers about the case, such as the bytes that an operator moves.
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
        """Builds a result from the measured values; percentiles are interpolated linearly."""
        p20, p50, p80 = (float(f"{value:.5g}") for value in np.percentile(values, [20, 50, 80]))
        return cls(suite, case, provider, unit, p20, p50, p80, len(values), extra)


@dataclass(frozen=True)
class BenchRun:
    """Results that were measured together. Only results of one run can be compared with each other.

    Attributes:
        environment: the machine and software, from `environment.environment`.
        settings: the network and masks, from `masks.settings`.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    results: list[Result]

    def find(self, suite: str, case: str, provider: str) -> Result | None:
        wanted = (suite, case, provider)
        return next((r for r in self.results if (r.suite, r.case, r.provider) == wanted), None)

    @property
    def main_masks(self) -> str:
        """The main kind of masks, which is the first: "real", or the name of a data set without files."""
        return next(iter(self.settings["distinct windows"]))


def save_runs(runs: Iterable[BenchRun], path: Path, beside: Mapping[str, Any] | None = None) -> None:
    """Writes the runs as JSON, and the items of `beside` as further keys of the file.

    Raises:
        UserError: the file cannot be written.
    """
    rest = "".join(f",\n{json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in (beside or {}).items())
    try:
        with replacing(path) as temporary:
            temporary.write_text('{"runs": [' + ",\n".join(map(_text, runs)) + f"]{rest}}}\n")
    except OSError as error:
        raise UserError(f"cannot write the results to {path}: {error.strerror}") from error


def load_runs(path: Path) -> list[BenchRun]:
    """Reads a file of `save_runs`. Raises UserError if the file is missing or has other contents."""
    try:
        content = json.loads(path.read_text())
        return [BenchRun(**{**run, "results": [Result(**r) for r in run["results"]]}) for run in content["runs"]]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} does not hold results of `spade bench` or `make bench`: {error}") from error


def file_name(what: str) -> str:
    """Returns the name of a result file for a device, such as "amd-epyc-2-threads.json" for "AMD EPYC 2 threads"."""
    return re.sub(r"\W+", "-", what.lower()) + ".json"


@dataclass(frozen=True)
class PartFile:
    """A file of results that can be read while another process still writes it. Each line is a JSON object."""

    path: Path

    def write(self, lines: Iterable[Result | Mapping[str, str]]) -> None:
        """Replaces the file, and writes each line as soon as `lines` yields it.

        A mapping holds all providers that failed so far, with the reasons.
        """
        with self.path.open("w") as file:
            for line in lines:
                content = asdict(line) if isinstance(line, Result) else {FAILURES: line}
                print(json.dumps(content), file=file, flush=True)

    def results(self) -> list[Result]:
        return [Result(**line) for line in self._lines() if FAILURES not in line]

    def failures(self) -> dict[str, str]:
        """Returns a dict from each provider that failed to the reason."""
        return next((line[FAILURES] for line in reversed(list(self._lines())) if line.get(FAILURES)), {})

    def _lines(self) -> Iterator[dict[str, Any]]:
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            with suppress(ValueError):
                yield json.loads(line)


def newest(results: Iterable[Result]) -> list[Result]:
    """Returns the last result of each suite, case and provider."""
    return list({(r.suite, r.case, r.provider): r for r in results}.values())


def _text(run: BenchRun) -> str:
    """Returns JSON with one line per result, so that people can read and compare the files, too."""
    lines = ",\n".join(json.dumps(asdict(result)) for result in run.results)
    where, what = json.dumps(run.environment, indent=1), json.dumps(run.settings, indent=1)
    return f'{{"environment": {where},\n"settings": {what},\n"results": [\n{lines}\n]}}'
