"""What must hold on two cores in float32: ngf 64, real COCO masks of 256 x 256 pixels, 184 channels, batch 1."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from spade_model.benchmark.results import (
    ALL_LAYERS,
    DENSE,
    EVAL,
    INDEX,
    PEAK,
    SAVED,
    TRAINING,
    BenchRun,
)


@dataclass(frozen=True)
class Must:
    """A bound on numerator / denominator, or on the numerator alone (in its unit).

    Attributes:
        suite, numerator, denominator: of the results. case: "" stands for the masks everything is measured on.
        bound: ">=", "<=", "<", or "" to report only. must, aim: the bound, and what is hoped for.
    """

    suite: str
    numerator: str
    denominator: str = ""
    bound: str = ""
    must: float = 0.0
    aim: float = 0.0
    case: str = ""


@dataclass(frozen=True)
class Verdict:
    """A bound and what was measured; `measured` is None where nothing was, and `met` where nothing can be compared."""

    name: str
    bound: str
    aim: str
    measured: float | None
    met: bool | None

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not run"
        return "reported" if self.met is None else "met" if self.met else "missed"


MUSTS = (
    Must(EVAL, "eager", "ours", ">=", 6, 8),
    Must(EVAL, "compiled", "ours", ">=", 2.5, 3.5),
    Must(EVAL, "ours", "spade-free", "<=", 1.1, 0.85),
    Must(EVAL, "ours", "spade-free-compiled", "<=", 1.6, 1.2),
    Must(TRAINING, "eager", "ours", ">=", 2.5, 3.2),
    Must(TRAINING, "ours", "spade-free", "<=", 1.4, 1.15),
    Must(SAVED, "eager", "ours", ">=", 4, 8),
    Must(INDEX, "ours", "", "<", 8, 3),
    Must(EVAL, "ours-dense", "ours", ">=", 0.95, 1.0, case="noise"),
    Must(DENSE, "eager", "ours", ">=", 1.3, 1.6, case=ALL_LAYERS),
    Must(DENSE, "compiled", "ours", ">=", 1.0, 1.2, case=ALL_LAYERS),
    Must(PEAK, "eager", "ours"),
)

_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def judge(run: BenchRun, musts: tuple[Must, ...] = MUSTS) -> list[Verdict]:
    """One verdict for each must, from medians."""
    return [_judge(run, must) for must in musts]


def _judge(run: BenchRun, must: Must) -> Verdict:
    case = must.case or run.main_masks
    top = run.find(must.suite, case, must.numerator)
    bottom = run.find(must.suite, case, must.denominator) if must.denominator else None
    measured = None
    if top is not None and not must.denominator:
        measured = top.p50
    elif top is not None and bottom is not None:
        measured = top.p50 / bottom.p50
    what = f"{must.numerator} / {must.denominator}" if must.denominator else must.numerator
    unit = "" if must.denominator else " ms"
    return Verdict(
        f"{must.suite}, {case}: {what}",
        f"{must.bound} {must.must:g}{unit}" if must.bound else "",
        f"{must.aim:g}{unit}" if must.bound else "",
        measured,
        bool(_COMPARE[must.bound](measured, must.must)) if must.bound and measured is not None else None,
    )
