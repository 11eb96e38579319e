"""The performance targets for generators with ngf 64, and real COCO masks of 256 x 256 pixels with 184 channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from spade_kernels import backends
from spade_model.benchmark import results
from spade_model.benchmark.results import BenchRun


@dataclass(frozen=True)
class Target:
    """A bound on the median of one provider, or on the ratio of the medians of two.

    Attributes:
        suite: suite of the results that are compared.
        numerator, denominator: providers; without a denominator, the bound is on the numerator's median, in ms.
        bound: ">=", "<=" or "<"; if empty, the value is reported and has no bound.
        required: the bound's value, which must be met.
        goal: a stricter value, which is desired.
        case: case of the results; if empty, the main kind of masks of the run.
    """

    suite: str
    numerator: str
    denominator: str = ""
    bound: str = ""
    required: float = 0.0
    goal: float = 0.0
    case: str = ""


@dataclass(frozen=True)
class Verdict:
    """The comparison of a target with a run.

    Attributes:
        measured: the measured value; None if the run has none.
        met: True if the bound is met; None without a bound or a measured value.
    """

    name: str
    bound: str
    goal: str
    measured: float | None
    met: bool | None

    @property
    def word(self) -> str:
        if self.measured is None:
            return "not run"
        return "reported" if self.met is None else "met" if self.met else "missed"


TARGETS = (
    Target(results.EVAL, "eager", "ours", ">=", 6, 8),
    Target(results.EVAL, "compiled", "ours", ">=", 2.5, 3.5),
    Target(results.EVAL, "ours", "spade-free", "<=", 1.1, 0.85),
    Target(results.EVAL, "ours", "spade-free-compiled", "<=", 1.6, 1.2),
    Target(results.TRAINING, "eager", "ours", ">=", 2.5, 3.2),
    Target(results.TRAINING, "ours", "spade-free", "<=", 1.4, 1.15),
    Target(results.SAVED, "eager", "ours", ">=", 4, 8),
    Target(results.INDEX, "ours", "", "<", 8, 3),
    Target(results.EVAL, "ours-dense", "ours", ">=", 0.95, 1.0, case="noise"),
    Target(results.DENSE, "eager", "ours", ">=", 1.3, 1.6, case=results.ALL_LAYERS),
    Target(results.DENSE, "compiled", "ours", ">=", 1.0, 1.2, case=results.ALL_LAYERS),
    Target(results.PEAK, "eager", "ours"),
)
"""The targets on a CPU with two cores, in float32 with batch size 1."""

_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def gpu_targets(run: BenchRun, batch: int) -> tuple[Target, ...]:
    """Returns the targets on a GPU for the batch size.

    The memory throughput of a kernel has a bound only if `backends.py` chooses the kernel; otherwise it is reported.
    """
    kind, taken = run.main_masks, backends.kernels_on("cuda")
    case = f"{kind}, bf16, batch {batch}"
    rates = []
    for name in ("modulate", "channel_stats"):
        for backend in ("cuda", "triton"):
            bound = ">=" if taken[name] in (backend, "reference") else ""
            largest = f"{name}, {at_full_size(run)}, bf16, batch {batch}"
            rates.append(Target(results.BANDWIDTH, backend, "copy", bound, 0.8, 0.9, largest))
    return (
        Target(results.EVAL, "baseline", _faster(run, results.EVAL, case), ">=", 2.0, 2.5, case),
        Target(results.TRAINING, "baseline", _faster(run, results.TRAINING, case), ">=", 1.6, 2.0, case),
        Target(results.LAYER, "baseline", "ours", ">=", 2.5, 3.5, f"{results.ALL_LAYERS}, bf16, batch {batch}"),
        Target(results.TRAINING, "original", _faster(run, results.TRAINING, case), case=case),
        *rates,
        Target(results.GPU_PEAK, "baseline", "ours", ">=", 2.0, 3.0, case),
        Target(results.GPU_INDEX, "cuda", "", "<", 0.3, 0.1, f"{kind}, integers, batch {batch}"),
        Target(results.EVAL, "baseline", "ours", ">=", 0.95, 1.0, f"noise, bf16, batch {batch}"),
    )


def at_full_size(run: BenchRun) -> str:
    """Returns the shape of the generator's last layer, at full size, as operator cases name it."""
    size = list(run.settings["distinct windows"][run.main_masks])[-1]
    return f"{run.settings['ngf']} x {size}"


def _faster(run: BenchRun, suite: str, case: str) -> str:
    """Returns the faster of "ours" and "ours-compiled"."""
    found = [result for name in ("ours", "ours-compiled") if (result := run.find(suite, case, name))]
    return min(found, key=lambda result: result.p50).provider if found else "ours"


def judge(run: BenchRun, targets: tuple[Target, ...] = TARGETS) -> list[Verdict]:
    """Returns one verdict per target."""
    return [_judge(run, target) for target in targets]


def _judge(run: BenchRun, target: Target) -> Verdict:
    case = target.case or run.main_masks
    top = run.find(target.suite, case, target.numerator)
    bottom = run.find(target.suite, case, target.denominator) if target.denominator else None
    measured = None
    if top is not None and not target.denominator:
        measured = top.p50
    elif top is not None and bottom is not None:
        measured = top.p50 / bottom.p50
    what = f"{target.numerator} / {target.denominator}" if target.denominator else target.numerator
    unit = "" if target.denominator else " ms"
    return Verdict(
        f"{target.suite}, {case}: {what}",
        f"{target.bound} {target.required:g}{unit}" if target.bound else "",
        f"{target.goal:g}{unit}" if target.bound else "",
        measured,
        bool(_COMPARE[target.bound](measured, target.required)) if target.bound and measured is not None else None,
    )
