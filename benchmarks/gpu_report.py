"""Compares the results of `make gpu-check` with the targets, formats tables of them, and writes the result file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from spade_model.benchmark import results
from spade_model.benchmark.results import BenchRun, PartFile, Result, load_runs, newest, save_runs
from spade_model.benchmark.steps import FAILED, NOT_RUN, PASSED, Step
from spade_model.benchmark.tables import by_provider, markdown
from spade_model.benchmark.targets import Verdict, at_full_size, gpu_targets, judge

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
_FASTER = ("baseline", "ours")
_TOYS = "reported (toy masks)"
_WORDS = {"met": "pass", "missed": "FAIL"}
_SAME = ("device", "torch", "cuda", "triton", "sources", "dataroot")  # must be equal for results in one file
DETERMINISM, SANITIZER = "determinism", "sanitizer"  # prefixes of step names


def verdicts(run: BenchRun, batch: int, steps: Sequence[Step]) -> list[Verdict]:
    """Returns the verdicts of all targets; on toy masks, performance is reported but not judged."""
    found = judge(run, gpu_targets(run, batch))
    if run.main_masks != "real":
        found = [replace(verdict, met=None) for verdict in found]
    return [
        *found,
        _from_steps("determinism (100 repeats under load): tests that differ", steps, DETERMINISM, r"(\d+) failed"),
        _from_steps("sanitizer findings", steps, SANITIZER, r"(\d+) findings"),
    ]


def _from_steps(name: str, steps: Sequence[Step], start: str, counted: str) -> Verdict:
    """Returns a verdict on the counts in the details of steps whose names begin with `start`: their sum must be 0."""
    found = [step for step in steps if step.name.startswith(start)]
    count = sum(int(n) for step in found for n in re.findall(counted, step.detail))
    clean = bool(found) and all(step.status == PASSED for step in found)
    return Verdict(name, "= 0", "0", count if count or clean else None, clean if count or clean else None)


def judged(verdicts: Sequence[Verdict]) -> Step:
    """Returns all verdicts as one step: FAILED if a bound is missed, PASSED if all are met, otherwise NOT_RUN."""
    missed = [v.name for v in verdicts if v.met is False]
    open_ = [v.name for v in verdicts if v.measured is None]
    met, toys = sum(v.met is True for v in verdicts), sum(_word(v) == _TOYS for v in verdicts)
    counts = f"{met} met, {len(missed)} missed, {len(open_)} not run" + (f", {toys} {_TOYS}" if toys else "")
    status = FAILED if missed else NOT_RUN if open_ or toys else PASSED
    lists = [f"; missed: {name}" for name in missed] + [f"; not run: {name}" for name in open_]
    return Step("bounds", status, 0.0, counts + "".join(lists))


def fastest(found: Iterable[Result]) -> dict[str, str]:
    """Returns a dict from operator and precision to the backend that is fastest over all layers."""
    best: dict[str, Result] = {}
    for result in found:
        if result.suite == results.OPERATOR and results.ALL_LAYERS in result.case:
            first = best.setdefault(result.case, result)
            best[result.case] = min(first, result, key=lambda r: r.p50)
    return {case: result.provider for case, result in best.items()}


def gathered(files: Iterable[Path]) -> tuple[list[Result], dict[str, dict[str, str]]]:
    """Returns the results in the files, and a dict from each file's stem to its failed providers and the reasons."""
    parts = [PartFile(path) for path in files]
    failures = {part.path.stem: why for part in parts if (why := part.failures())}
    return newest(result for part in parts for result in part.results()), failures


def earlier(path: Path, environment: dict[str, Any]) -> tuple[list[Result], list[Step], dict[str, dict[str, str]]]:
    """Returns results, steps and failures of an earlier file; empty if code, device, versions or masks differ."""
    if not path.exists():
        return [], [], {}
    (run,) = load_runs(path)
    if any(run.environment.get(key) != environment.get(key) for key in _SAME):
        return [], [], {}
    content = json.loads(path.read_text())
    return run.results, [Step(**step) for step in content["steps"]], content[results.FAILURES]


def save(
    path: Path,
    run: BenchRun,
    verdicts: Sequence[Verdict],
    steps: Sequence[Step],
    failed: dict[str, dict[str, str]],
) -> None:
    """Writes a file that `load_runs` can read, which also holds steps, verdicts, fastest backends and failures."""
    beside = {
        "steps": [asdict(step) for step in steps],
        "bounds": [asdict(verdict) | {"word": _word(verdict)} for verdict in verdicts],
        "fastest": fastest(run.results),
        results.FAILURES: failed,
    }
    save_runs([run], path, beside)


def tables(run: BenchRun, verdicts: Sequence[Verdict], failed: dict[str, dict[str, str]]) -> str:
    """Returns a summary of the results as tables; the last one has the targets."""

    def of(*suites: str, only: str = "") -> list[Result]:
        return [r for r in run.results if r.suite in suites and only in r.case]

    lines = [["bound", "required", "goal", "measured", ""]]
    for v in verdicts:
        measured = "" if v.measured is None else f"{v.measured:.3g}"
        lines.append([v.name, v.bound, v.goal, measured, _word(v)])
    texts = [
        by_provider(of(results.EVAL, results.TRAINING, results.GPU_PEAK), _PROVIDERS, [_FASTER]),
        by_provider(of(results.LAYER, results.LAYER_TRAINING, only=results.ALL_LAYERS), _PROVIDERS, [_FASTER]),
        by_provider(of(results.GPU_INDEX, results.INDEX_GROUPS, results.LABEL_MAP), _KERNELS),
        by_provider(of(results.OPERATOR, only=results.ALL_LAYERS), _KERNELS),
        by_provider(of(results.BANDWIDTH, only=at_full_size(run)), _KERNELS, [("cuda", "copy")]),
        by_provider(of(results.PRODUCTS, only="bf16"), _KERNELS, [("triton", "matmul")]),
        "\n".join(f"left out of {part}: {who}: {why[:200]}" for part in failed for who, why in failed[part].items()),
        markdown(lines),
    ]
    return "\n\n".join(text for text in texts if text)


def _word(verdict: Verdict) -> str:
    if verdict.measured is not None and verdict.met is None and verdict.bound:
        return _TOYS
    return _WORDS.get(verdict.word, verdict.word)
