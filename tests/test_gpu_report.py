"""The report of `make gpu-check`: bounds, tables, and what was not run."""

from __future__ import annotations

import dataclasses
import json
from collections import defaultdict

import pytest

from benchmarks import gpu_report as report
from spade_model.benchmark import results, steps, targets
from spade_model.benchmark.results import ALL_LAYERS, EVAL, LAYER, TRAINING, BenchRun, Result, load_runs


def result(suite: str, case: str, provider: str, value: float, unit: str = "ms") -> Result:
    return Result.of(suite, case, provider, [value], unit)


ENVIRONMENT = {"device": "NVIDIA H100 80GB HBM3", "torch": "2.11", "sources": "abc"}
SETTINGS = {"ngf": 64, "distinct windows": {"real": {"8 x 8": 1.0, "256 x 256": 0.1}, "noise": {}}}
STEPS = [steps.Step(name, "passed", 3.0, "well") for name in ("determinism", "sanitizer a")]


@pytest.fixture
def run(monkeypatch) -> BenchRun:
    # Nothing is built.
    monkeypatch.setattr(targets.backends, "kernels_on", lambda device: defaultdict(lambda: "reference"))
    case, size = "real, bf16, batch 8", "64 x 256 x 256, bf16, batch 8"
    lines = [
        result(EVAL, case, "baseline", 6.0),
        result(EVAL, case, "ours", 2.5),
        result(TRAINING, case, "baseline", 15.0),
        result(TRAINING, case, "ours", 10.0),
        result(LAYER, f"{ALL_LAYERS}, bf16, batch 8", "ours", 1.0),
        result(results.GPU_INDEX, "real, integers, batch 8", "cuda", 0.2),
        result(results.BANDWIDTH, f"modulate, {size}", "cuda", 2700.0, "GB/s"),
        result(results.BANDWIDTH, f"modulate, {size}", "copy", 3000.0, "GB/s"),
        result(results.OPERATOR, f"modulate, {ALL_LAYERS}, bf16, batch 8", "cuda", 1.0),
        result(results.OPERATOR, f"modulate, {ALL_LAYERS}, bf16, batch 8", "triton", 0.9),
    ]
    return BenchRun(ENVIRONMENT, SETTINGS, lines)


class TestReport:
    def test_bounds(self, run):
        verdicts = report.verdicts(run, 8, STEPS)
        words = {v.name: v.word for v in verdicts}
        assert words["generator eval, real, bf16, batch 8: baseline / ours"] == "met"
        assert words["generator forward + backward, real, bf16, batch 8: baseline / ours"] == "missed"
        assert words["window indexes, real, integers, batch 8: cuda"] == "met"
        assert words["bandwidth, modulate, 64 x 256 x 256, bf16, batch 8: cuda / copy"] == "met"
        assert words["bandwidth, modulate, 64 x 256 x 256, bf16, batch 8: triton / copy"] == "not run"
        assert words[f"layer forward, {ALL_LAYERS}, bf16, batch 8: baseline / ours"] == "not run"
        step = report.judged(verdicts)
        assert step.status == "FAILED"
        assert "missed: generator forward + backward, real" in step.detail
        assert report.judged([v for v in verdicts if v.word != "missed"]).status == "not run"
        assert "not run: generator eval, noise, bf16" in step.detail
        assert report.judged([v for v in verdicts if v.word == "met"]).status == "passed"

    def test_toy_masks_decide_nothing(self, run):
        toys = dataclasses.replace(run, settings=json.loads(json.dumps(SETTINGS).replace("real", "toy")))
        lines = [dataclasses.replace(r, case=r.case.replace("real", "toy")) for r in run.results]
        verdicts = report.verdicts(dataclasses.replace(toys, results=lines), 8, STEPS)
        rows = report.tables(toys, verdicts, {}).splitlines()
        row = next(row for row in rows if "generator eval, toy, bf16, batch 8: baseline" in row)
        assert row.rstrip("| ").endswith("reported (toy masks)")
        assert not [row for row in rows if "FAIL" in row]
        assert [v.met for v in verdicts if v.name.startswith(("determinism", "sanitizer"))] == [True, True]
        assert report.judged([v for v in verdicts if v.measured is not None]).status == "not run"

    def test_the_faster_of_ours(self, run):
        compiled = result(EVAL, "real, bf16, batch 8", "ours-compiled", 2.0)
        both = dataclasses.replace(run, results=[*run.results, compiled])
        names = {v.name: v.measured for v in targets.judge(both, targets.gpu_targets(both, 8))}
        assert names["generator eval, real, bf16, batch 8: baseline / ours-compiled"] == 3.0

    @pytest.mark.parametrize(
        ("status", "detail", "measured", "word"),
        [
            ("passed", "== 8 passed in 3s ==", 0, "met"),
            ("FAILED", "exit status 1: == 2 failed, 6 passed in 3s ==", 2, "missed"),
            ("FAILED", "stopped after 60 s: tests/gpu/test_device.py::test_same PASSED", None, "not run"),
            ("not run", "no time left", None, "not run"),
        ],
    )
    def test_determinism(self, run, status, detail, measured, word):
        done = [steps.Step("determinism", status, 3.0, detail)]
        *_, repeated, findings = report.verdicts(run, 8, done)
        assert (repeated.measured, repeated.word, findings.word) == (measured, word, "not run")

    def test_sanitizers_count_together(self, run):
        found = [steps.Step(f"sanitizer {i}", "FAILED", 3.0, f"{i}: 2 findings, in f") for i in range(2)]
        assert report.verdicts(run, 8, found)[-1].measured == 4
        assert report.verdicts(run, 8, [*STEPS, steps.Step("sanitizer b", "not run", 0.0, "")])[-1].word == "not run"

    def test_only_the_kernels_that_are_taken_must_be_fast(self, run, monkeypatch):
        taken = {"modulate": "cuda", "channel_stats": "triton"}
        monkeypatch.setattr(targets.backends, "kernels_on", lambda device: taken)
        bounds = {
            (m.case.split(",")[0], m.numerator): m.bound for m in targets.gpu_targets(run, 8) if m.denominator == "copy"
        }
        assert bounds == {
            ("modulate", "cuda"): ">=",
            ("modulate", "triton"): "",
            ("channel_stats", "cuda"): "",
            ("channel_stats", "triton"): ">=",
        }

    def test_the_fastest_backend(self, run):
        assert report.fastest(run.results) == {f"modulate, {ALL_LAYERS}, bf16, batch 8": "triton"}

    def test_tables_say_what_was_not_run(self, run):
        text = report.tables(run, report.verdicts(run, 8, []), {"eval-bf16-8": {"baseline": "it broke"}})
        assert "left out of eval-bf16-8: baseline: it broke" in text
        rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
        assert rows["generator eval, real, bf16, batch 8: baseline / ours"].rstrip("| ").endswith("pass")
        assert rows["generator forward + backward, real, bf16, batch 8: baseline / ours"].rstrip("| ").endswith("FAIL")
        assert rows["generator eval, noise, bf16, batch 8: baseline / ours"].rstrip("| ").endswith("not run")
        assert "2.40" in rows["generator eval, real, bf16, batch 8, ms"]

    def test_the_file_holds_everything(self, run, tmp_path):
        path = tmp_path / "new" / results.file_name(ENVIRONMENT["device"])
        assert path.name == "nvidia-h100-80gb-hbm3.json"
        done = [steps.Step("build", "passed", 61.0, "well"), steps.Step("tests", "FAILED", 3.0, "not well")]
        failed = {"eval-bf16-8": {"baseline": "it broke"}}
        report.save(path, run, report.verdicts(run, 8, done), done, failed)
        assert load_runs(path) == [run]
        content = json.loads(path.read_text())
        assert content["steps"][1]["status"] == "FAILED"
        assert content["bounds"][0]["word"] == "pass"
        assert report.earlier(path, ENVIRONMENT) == (run.results, done, failed)
        assert report.earlier(path, ENVIRONMENT | {"sources": "def"}) == ([], [], {})
        assert report.earlier(tmp_path / "none.json", ENVIRONMENT) == ([], [], {})

    def test_new_results_take_the_place_of_old_ones(self, tmp_path):
        lines = [json.dumps(vars(result(EVAL, "a", "ours", value))) for value in (1.0, 2.0)]
        (tmp_path / "first.jsonl").write_text("\n".join(lines))
        (tmp_path / "killed.jsonl").write_text(json.dumps(vars(result(EVAL, "b", "ours", 3.0))) + '\n{"suite": "gen')
        (tmp_path / "never.jsonl").write_text('{"failed": {}}\n{"failed": {"ours": "why"}}\n')
        paths = [tmp_path / f"{name}.jsonl" for name in ("first", "killed", "never", "unwritten")]
        found, failed = report.gathered(paths)
        assert failed == {"never": {"ours": "why"}}
        assert [(r.case, r.p50) for r in found] == [("a", 2.0), ("b", 3.0)]
        assert [r.p50 for r in results.newest([*found, result(EVAL, "a", "ours", 5.0)])] == [5.0, 3.0]
