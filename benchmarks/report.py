"""Prints tables of results, and draws plots.

    python benchmarks/report.py FILE... [--out FILE or FOLDER] [--plots FOLDER]

A FILE is a result file of pytest-benchmark, of `spade bench` or of this program. Repeats are combined into medians and
percentiles; files with the same allocator settings are combined into one run. The tables show all results, a summary of
whole networks, and the targets.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from spade_model.benchmark import results, tables
from spade_model.benchmark.results import BenchRun, Result, file_name, load_runs, save_runs
from spade_model.errors import UserError


def read(path: Path) -> list[BenchRun]:
    """Reads the runs of a result file. Raises UserError if it cannot be read."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    if "spade" not in content:
        return load_runs(path)
    return [BenchRun(**content["spade"], results=aggregated(content["benchmarks"]))]


def aggregated(timings: list[dict]) -> list[Result]:
    """Combines the single timings of pytest-benchmark into one result per suite, case and provider."""
    values: dict[tuple, list[float]] = defaultdict(list)
    extra: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for timing in timings:
        info = timing["extra_info"]
        key = info["suite"], info["case"], info["provider"], info.get("unit", "ms")
        values[key].append(info.get("value", timing["stats"]["median"] * 1e3))
        extra[key].append(info["extra"])
    notes = {key: {name: statistics.mean(e[name] for e in each) for name in each[0]} for key, each in extra.items()}
    return [
        *(_result(key, each, notes[key]) for key, each in values.items()),
        *_all_layers(values, notes),
    ]


def _result(key: tuple, values: list[float], notes: dict[str, float]) -> Result:
    suite, case, provider, unit = key
    if "MB" in notes:
        notes = notes | {"GB/s": notes["MB"] / statistics.median(values)}
    return Result.of(suite, case, provider, values, unit, **notes)


def _all_layers(values: dict[tuple, list[float]], notes: dict[tuple, dict]) -> list[Result]:
    """Returns the times of all layers together: in each repeat, the sum over all layers of the generator."""
    sums: dict[tuple, list[list[float]]] = defaultdict(list)
    for (suite, _, provider, unit), each in values.items():
        layers = notes[suite, _, provider, unit].get("layers")
        if layers:
            sums[suite, results.ALL_LAYERS, provider, unit].append([layers * value for value in each])
    return [_result(key, [sum(repeat) for repeat in zip(*each, strict=True)], {}) for key, each in sums.items()]


def merged(runs: Sequence[BenchRun]) -> list[BenchRun]:
    """Combines the runs with the same allocator settings. Raises UserError if networks, masks or devices differ."""
    found: dict[str, BenchRun] = {}
    for run in runs:
        first = found.setdefault(run.environment["allocator"], BenchRun(run.environment, run.settings, []))
        if _comparable(first) != _comparable(run):
            raise UserError("the files were measured on different masks, networks or devices; report them one by one")
        first.results.extend(run.results)
    return list(found.values())


def _comparable(run: BenchRun) -> tuple:
    return run.settings, run.environment["device"], run.environment["threads"]


def draw(run: BenchRun, folder: Path) -> list[Path]:
    """Draws bar plots of whole generators by kind of mask, and of layers by shape; returns the written files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    written = []
    layers = results.LAYER, results.LAYER_TRAINING, results.DENSE
    for suites, name in (((results.EVAL, results.TRAINING), "generator"), (layers, "layers")):
        present = [suite for suite in suites if any(r.suite == suite for r in run.results)]
        if not present:
            continue
        figure, axes = pyplot.subplots(1, len(present), figsize=(6 * len(present), 4), squeeze=False)
        for axis, suite in zip(axes[0], present, strict=True):
            _draw_suite(axis, [r for r in run.results if r.suite == suite and r.case != results.ALL_LAYERS])
            axis.set(title=suite, ylabel="ms, median and 20 % - 80 %", yscale="log")
        where = run.environment
        figure.suptitle(f"{where['device']}, {where['threads']} threads, {where['date']}, {allocator_name(run)}")
        figure.tight_layout()
        written.append(folder / f"{name}-{allocator_name(run).replace(' ', '-')}.png")
        figure.savefig(written[-1], dpi=120)
        pyplot.close(figure)
    return written


def _draw_suite(axis, found: list[Result]) -> None:
    cases = list(dict.fromkeys(r.case for r in found))
    providers = list(dict.fromkeys(r.provider for r in found))
    for place, provider in enumerate(providers):
        mine = [r for r in found if r.provider == provider]
        at = [cases.index(r.case) + 0.8 * (place + 0.5) / len(providers) - 0.4 for r in mine]
        spread = [[r.p50 - r.p20 for r in mine], [r.p80 - r.p50 for r in mine]]
        axis.bar(at, [r.p50 for r in mine], 0.8 / len(providers), yerr=spread, label=provider)
    axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right")
    axis.legend()


def allocator_name(run: BenchRun) -> str:
    return "default allocator" if run.environment["allocator"] == "default" else "thresholds raised"


def print_report(runs: list[BenchRun]) -> None:
    for run in runs:
        print(f"# Everything, {allocator_name(run)}\n\n{tables.everything(run)}\n")
    for run in runs:
        print(f"# Summary, {allocator_name(run)}\n\n{tables.summary(run)}\n\n{tables.caption(run)}\n")
    print(f"# Bounds\n\n{tables.musts_table({allocator_name(run): run for run in runs})}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument(
        "--out", type=Path, help="JSON file to write, or a folder, in which the file is named after the device"
    )
    parser.add_argument("--plots", type=Path, help="folder in which plots are written")
    arguments = parser.parse_args(argv)
    try:
        runs = merged([run for path in arguments.files for run in read(path)])
        print_report(runs)
        if arguments.out:
            save_runs(runs, _named(arguments.out, runs[0]))
    except UserError as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    if arguments.plots:
        arguments.plots.mkdir(parents=True, exist_ok=True)
        for run in runs:
            draw(run, arguments.plots)
    return 0


def _named(out: Path, run: BenchRun) -> Path:
    name = file_name(f"{run.environment['device']}-{run.environment['threads']}-threads")
    return out / name if out.is_dir() else out


if __name__ == "__main__":
    sys.exit(main())
