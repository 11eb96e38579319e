"""Formats results as markdown tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from spade_model.benchmark.results import EVAL, PEAK, SAVED, STEP, TRAINING, BenchRun, Result
from spade_model.benchmark.targets import judge

_COLUMNS = ("eager", "tuned", "compiled", "ours", "ours-reference", "spade-free", "spade-free-compiled")
_MEANINGS = {
    "eager": "stock PyTorch, as the paper describes the network",
    "tuned": "stock PyTorch, channels-last, with one convolution for gamma and beta; spectral norm folded in eval",
    "compiled": "torch.compile of tuned",
    "ours": "spade_kernels",
    "ours-reference": "spade_kernels in plain PyTorch, without compiled kernels",
    "spade-free": "tuned without its SPADE layers: the cost of the rest of the network",
    "spade-free-compiled": "torch.compile of spade-free",
}
_RATIOS = (("eager", "ours"), ("compiled", "ours"), ("ours", "spade-free"))


def caption(run: BenchRun) -> str:
    """Returns one line that describes the network, the masks, the machine and the date of a run."""
    settings, where = run.settings, run.environment
    distinct = settings["distinct windows"][run.main_masks]
    size, fraction = list(distinct.items())[-1]
    commit = f"commit {where['commit']}, " if where["commit"] else ""
    masks = f"{settings['masks']} {run.main_masks} mask" + "s" * (settings["masks"] > 1)
    return (
        f"SPADEGenerator ngf {settings['ngf']}, {size} pixels, {settings['channels']} condition channels, batch 1, "
        f"float32; medians (20 % - 80 %) over {masks}, {fraction:.1%} distinct windows; "
        f"{where['device']}, {where['threads']} threads, {where['isa']}, torch {where['torch']}, "
        f"{where['date']}, {commit}allocator {where['allocator']}"
    )


def summary(run: BenchRun) -> str:
    """Returns a table of whole-network suites with one column per provider, and the most important ratios."""
    rows = [EVAL, TRAINING, STEP, SAVED, PEAK]
    found = [r for suite in rows for r in run.results if r.suite == suite and r.case == run.main_masks]
    return by_provider(found, _COLUMNS, _RATIOS, lambda r: f"{r.suite}, {r.unit}") or "(no whole network was measured)"


def by_provider(
    results: Sequence[Result],
    columns: Sequence[str],
    ratios: Sequence[tuple[str, str]] = (),
    label: Callable[[Result], str] = lambda r: f"{r.suite}, {r.case}, {r.unit}",
) -> str:
    """Returns a table with one row per suite and case, and one column per provider that has any result.

    Args:
        columns: the providers, in order.
        ratios: pairs of providers; a column shows the ratio of their medians.
        label: returns the first cell of the row of a result.
    """
    present = [name for name in columns if any(r.provider == name for r in results)]
    pairs = [pair for pair in ratios if set(pair) <= set(present)]
    lines = [["", *present, *(f"{top} / {bottom}" for top, bottom in pairs)]]
    for suite, case in dict.fromkeys((r.suite, r.case) for r in results):
        here = {r.provider: r for r in results if (r.suite, r.case) == (suite, case)}
        lines.append(
            [label(next(iter(here.values())))]
            + [spread(here[name]) if name in here else "" for name in present]
            + [f"{here[t].p50 / here[b].p50:.2f}" if {t, b} <= here.keys() else "" for t, b in pairs]
        )
    return markdown(lines) if results else ""


def legend(run: BenchRun) -> str:
    """Returns one line per provider of the run, which explains it."""
    measured = {r.provider for r in run.results}
    return "\n".join(f"{name}: {meaning}" for name, meaning in _MEANINGS.items() if name in measured)


def everything(run: BenchRun) -> str:
    """Returns a table of all results, with the ratio of each median to that of "ours" for the same suite and case."""
    lines = [["what", "on", "provider", "median (20 % - 80 %)", "/ ours", "notes"]]
    for r in run.results:
        ours = run.find(r.suite, r.case, "ours")
        notes = ", ".join(f"{name} {value:.4g}" for name, value in r.extra.items())
        ratio = f"{r.p50 / ours.p50:.2f}" if ours else ""
        lines.append([r.suite, r.case, r.provider, f"{spread(r)} {r.unit}", ratio, notes])
    return markdown(lines)


def musts_table(runs: Mapping[str, BenchRun]) -> str:
    """Returns a table of `targets.TARGETS`, with one column per run that says which of them the run meets."""
    lines = [["row", "required", "goal", *runs]]
    for verdicts in zip(*map(judge, runs.values()), strict=True):
        measured = (f"{v.measured:.3g} {v.word}" if v.measured is not None else v.word for v in verdicts)
        lines.append([verdicts[0].name, verdicts[0].bound, verdicts[0].goal, *measured])
    return markdown(lines)


def spread(result: Result) -> str:
    """Returns the median as text, followed by the percentiles if there is more than one value."""
    low, middle, high = (f"{v:.0f}" if v >= 1000 else f"{v:.3g}" for v in (result.p20, result.p50, result.p80))
    return f"{middle} ({low} - {high})" if result.count > 1 else middle


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Returns a table with aligned columns; the first line is the header."""
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [
        "| " + " | ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    ]
    return "\n".join([rows[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *rows[1:]])
