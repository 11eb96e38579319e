"""The targets bound performance for ngf 64, real COCO masks of 256 x 256 pixels and 184 channels."""

from __future__ import annotations

import operator
from dataclasses import dataclass

from spade_kernels import backends
from spade_model.benchmark import results
from spade_model.benchmark.results import BenchRun


@dataclass(frozen=True)
class Target:
    """A bound on numerator / denominator, or on the numerator alone (in its unit).

    Attributes:
        suite, numerator, denominator: of the results. case: "" stands for the masks everything is measured on.
        bound: ">=", "<=", "<", or "" to report only. required, goal: the bound, and the value hoped for.
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
    """A bound and what was measured; `measured` is None where nothing was, and `met` where nothing can be compared."""

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
"""The bounds on two cores in float32, batch 1."""

_COMPARE = {">=": operator.ge, "<=": operator.le, "<": operator.lt}


def gpu_targets(run: BenchRun, batch: int) -> tuple[Target, ...]:
    """Returns the bounds on a GPU for generators of ngf 64 and real COCO masks of 256 x 256 pixels.

    Where memory bounds a kernel, it must be fast if `backends.py` takes it, and is only reported otherwise.
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
    """Returns the part of a case that names the generator's last layer, at the masks' size."""
    size = list(run.settings["distinct windows"][run.main_masks])[-1]
    return f"{run.settings['ngf']} x {size}"


def _faster(run: BenchRun, suite: str, case: str) -> str:
    """Returns "ours" or "ours-compiled"."""
    found = [result for name in ("ours", "ours-compiled") if (result := run.find(suite, case, name))]
    return min(found, key=lambda result: result.p50).provider if found else "ours"


def judge(run: BenchRun, targets: tuple[Target, ...] = TARGETS) -> list[Verdict]:
    """Returns one verdict for each target, from medians."""
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
