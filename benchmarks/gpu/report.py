"""The bounds that must hold on a GPU, the tables, and the file with everything."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from gpu.generator import PEAK
from gpu.operators import BANDWIDTH, INDEX, INDEX_GROUPS, LABEL_MAP, OPERATOR, PRODUCTS
from gpu.parts import FAILURES
from gpu.steps import FAILED, NOT_RUN, PASSED, Step
from spade_kernels import backends
from spade_model.benchmark.results import ALL_LAYERS, EVAL, LAYER, LAYER_TRAINING, TRAINING, BenchRun, Result, load_runs
from spade_model.benchmark.tables import markdown, spread
from spade_model.benchmark.targets import Target, Verdict, judge

_PROVIDERS = (
    "original",
    "tuned",
    "baseline",
    "ours",
    "ours-compiled",
    "ours-indexed",
    "ours-replay",
    "ours-dense",
    "spade-free",
)
_KERNELS = ("cuda", "triton", "cpu", "reference", "copy", "matmul")
_TOYS = "reported (toy masks)"
_WORDS = {"met": "pass", "missed": "FAIL"}
_SAME = ("device", "torch", "cuda", "triton", "sources", "dataroot")  # for results to stand in one file
DETERMINISM, SANITIZER = "determinism", "sanitizer"  # how the names of those steps begin


def verdicts(run: BenchRun, batch: int, steps: Sequence[Step]) -> list[Verdict]:
    """The verdicts of all bounds; measurements on toy masks are reported without a verdict."""
    found = judge(run, targets(run, batch))
    if run.main_masks != "real":
        found = [replace(verdict, met=None) for verdict in found]
    return [
        *found,
        _from_steps("determinism (100 repeats under load): tests that differ", steps, DETERMINISM, r"(\d+) failed"),
        _from_steps("sanitizer findings", steps, SANITIZER, r"(\d+) findings"),
    ]


def _from_steps(name: str, steps: Sequence[Step], start: str, counted: str) -> Verdict:
    """A bound of zero on what the steps whose names start so have counted."""
    found = [step for step in steps if step.name.startswith(start)]
    count = sum(int(n) for step in found for n in re.findall(counted, step.detail))
    clean = bool(found) and all(step.status == PASSED for step in found)
    return Verdict(name, "= 0", "0", count if count or clean else None, clean if count or clean else None)


def targets(run: BenchRun, batch: int) -> tuple[Target, ...]:
    """The bounds for generators of ngf 64 and real COCO masks of 256 x 256 pixels.

    Where memory bounds a kernel, it must be fast if `backends.py` takes it, and is only reported otherwise.
    """
    kind, taken = run.main_masks, backends.kernels_on("cuda")
    case = f"{kind}, bf16, batch {batch}"
    rates = []
    for name in ("modulate", "channel_stats"):
        for backend in ("cuda", "triton"):
            bound = ">=" if taken[name] in (backend, "reference") else ""
            rates.append(Target(BANDWIDTH, backend, "copy", bound, 0.8, 0.9, _largest(run, name, batch)))
    return (
        Target(EVAL, "baseline", _faster(run, EVAL, case), ">=", 2.0, 2.5, case),
        Target(TRAINING, "baseline", _faster(run, TRAINING, case), ">=", 1.6, 2.0, case),
        Target(LAYER, "baseline", "ours", ">=", 2.5, 3.5, f"{ALL_LAYERS}, bf16, batch {batch}"),
        Target(TRAINING, "original", _faster(run, TRAINING, case), case=case),
        *rates,
        Target(PEAK, "baseline", "ours", ">=", 2.0, 3.0, case),
        Target(INDEX, "cuda", "", "<", 0.3, 0.1, f"{kind}, integers, batch {batch}"),
        Target(EVAL, "baseline", "ours", ">=", 0.95, 1.0, f"noise, bf16, batch {batch}"),
    )


def _faster(run: BenchRun, suite: str, case: str) -> str:
    """ "ours", or "ours-compiled"."""
    found = [result for name in ("ours", "ours-compiled") if (result := run.find(suite, case, name))]
    return min(found, key=lambda result: result.p50).provider if found else "ours"


def judged(verdicts: Sequence[Verdict]) -> Step:
    """The bounds as one step: FAILED where one is missed, PASSED where every one is met."""
    missed = [v.name for v in verdicts if v.met is False]
    open_ = [v.name for v in verdicts if v.measured is None]
    met, toys = sum(v.met is True for v in verdicts), sum(_word(v) == _TOYS for v in verdicts)
    counts = f"{met} met, {len(missed)} missed, {len(open_)} not run" + (f", {toys} {_TOYS}" if toys else "")
    status = FAILED if missed else NOT_RUN if open_ or toys else PASSED
    lists = [f"; missed: {name}" for name in missed] + [f"; not run: {name}" for name in open_]
    return Step("bounds", status, 0.0, counts + "".join(lists))


def fastest(results: Iterable[Result]) -> dict[str, str]:
    """By operator and precision, the backend with the least time over all layers: for the table in `backends.py`."""
    best: dict[str, Result] = {}
    for result in results:
        if result.suite == OPERATOR and ALL_LAYERS in result.case:
            first = best.setdefault(result.case, result)
            best[result.case] = min(first, result, key=lambda r: r.p50)
    return {case: result.provider for case, result in best.items()}


def gathered(folder: Path, names: Iterable[str]) -> list[Result]:
    """The results that the parts of these names have written so far; of a killed part, its whole lines."""
    return merged([], (Result(**line) for _, line in _lines(folder, names) if FAILURES not in line))


def failures(folder: Path, names: Iterable[str]) -> dict[str, dict[str, str]]:
    """By part, who was left out, and why."""
    return {name: line[FAILURES] for name, line in _lines(folder, names) if line.get(FAILURES)}


def _lines(folder: Path, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in names:
        path = folder / f"{name}.jsonl"
        for line in path.read_text().splitlines() if path.exists() else ():
            with suppress(ValueError):
                yield name, json.loads(line)


def earlier(path: Path, environment: dict[str, Any]) -> tuple[list[Result], list[Step], dict[str, dict[str, str]]]:
    """Results, steps and failures in the file, if it is of the same code on the same device and masks."""
    if not path.exists():
        return [], [], {}
    (run,) = load_runs(path)
    if any(run.environment.get(key) != environment.get(key) for key in _SAME):
        return [], [], {}
    content = json.loads(path.read_text())
    return run.results, [Step(**step) for step in content["steps"]], content[FAILURES]


def merged(old: Iterable[Result], new: Iterable[Result]) -> list[Result]:
    """All of them; where both have one, the new."""
    return list({(r.suite, r.case, r.provider): r for r in (*old, *new)}.values())


def save(
    path: Path,
    run: BenchRun,
    verdicts: Sequence[Verdict],
    steps: Sequence[Step],
    failed: dict[str, dict[str, str]],
) -> None:
    """Everything, in the form that `load_runs` reads, with the bounds, the choice and the steps beside it."""
    lines = ",\n".join(json.dumps(asdict(result)) for result in run.results)
    head = f'"environment": {json.dumps(run.environment, indent=1)},\n"settings": {json.dumps(run.settings, indent=1)}'
    beside = {
        "steps": [asdict(step) for step in steps],
        "bounds": [asdict(verdict) | {"word": _word(verdict)} for verdict in verdicts],
        "fastest": fastest(run.results),
        FAILURES: failed,
    }
    text = ",\n".join(f"{json.dumps(name)}: {json.dumps(value, indent=1)}" for name, value in beside.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    temporary.write_text(f'{{"runs": [{{{head},\n"results": [\n{lines}\n]}}],\n{text}}}\n')
    os.replace(temporary, path)


def file_name(environment: dict[str, Any]) -> str:
    """After the device, as the files of `make bench` are."""
    return re.sub(r"\W+", "-", str(environment.get("device", "unknown device")).lower()) + ".json"


def tables(run: BenchRun, verdicts: Sequence[Verdict], failed: dict[str, dict[str, str]]) -> str:
    """A summary short enough for a screen or two, the bounds last."""
    lines = [["bound", "required", "goal", "measured", ""]]
    for v in verdicts:
        measured = "" if v.measured is None else f"{v.measured:.3g}"
        lines.append([v.name, v.bound, v.goal, measured, _word(v)])
    texts = [
        by_provider(run, (EVAL, TRAINING, PEAK), _PROVIDERS, ("baseline", "ours")),
        by_provider(run, (LAYER, LAYER_TRAINING), _PROVIDERS, ("baseline", "ours"), only=ALL_LAYERS),
        by_provider(run, (INDEX, INDEX_GROUPS, LABEL_MAP), _KERNELS),
        by_provider(run, (OPERATOR,), _KERNELS, only=ALL_LAYERS),
        by_provider(run, (BANDWIDTH,), _KERNELS, ("cuda", "copy"), only=_at_full_size(run)),
        by_provider(run, (PRODUCTS,), _KERNELS, ("triton", "matmul"), only="bf16"),
        "\n".join(f"left out of {part}: {who}: {why[:200]}" for part in failed for who, why in failed[part].items()),
        markdown(lines),
    ]
    return "\n\n".join(text for text in texts if text)


def by_provider(
    run: BenchRun, suites: Sequence[str], columns: Sequence[str], ratio: tuple[str, str] | None = None, only: str = ""
) -> str:
    """One row for each suite and case that holds `only`, one column for each provider; "" if there is no row."""
    found = [r for r in run.results if r.suite in suites and only in r.case]
    present = [name for name in columns if any(r.provider == name for r in found)]
    both = ratio is not None and set(ratio) <= set(present)
    lines = [["", *present, *([" / ".join(ratio)] if ratio and both else [])]]
    for suite, case in dict.fromkeys((r.suite, r.case) for r in found):
        here = {r.provider: r for r in found if (r.suite, r.case) == (suite, case)}
        line = [f"{suite}, {case}, {next(iter(here.values())).unit}"]
        line += [spread(here[name]) if name in here else "" for name in present]
        if ratio and both:
            top, bottom = ratio
            line.append(f"{here[top].p50 / here[bottom].p50:.2f}" if {top, bottom} <= here.keys() else "")
        lines.append(line)
    return markdown(lines) if found else ""


def _word(verdict: Verdict) -> str:
    if verdict.measured is not None and verdict.met is None and verdict.bound:
        return _TOYS
    return _WORDS.get(verdict.word, verdict.word)


def _at_full_size(run: BenchRun) -> str:
    """The generator's last layer, at the masks' size: the case holds it."""
    size = list(run.settings["distinct windows"][run.main_masks])[-1]
    return f"{run.settings['ngf']} x {size}"


def _largest(run: BenchRun, name: str, batch: int) -> str:
    return f"{name}, {_at_full_size(run)}, bf16, batch {batch}"
