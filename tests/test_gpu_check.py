"""`make gpu-check`, as far as it goes without a GPU: it finds failures, takes the right times and forgets nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check, gpu_measure, gpu_sanitize
from benchmarks.gpu_suites import compilation, evaluation, layers, operators, sanitizers, training
from spade_kernels import LabelMap
from spade_kernels.testing import random_label_map
from spade_model.benchmark import calls, clock, environment, masks, results, shapes, steps, verification, workload
from spade_model.benchmark.results import ALL_LAYERS, EVAL, TRAINING, Result, load_runs

CPU = torch.device("cpu")


@pytest.fixture
def runner(tmp_path):
    return steps.Steps(tmp_path / "work", tmp_path / "all.log", tmp_path, seconds=30)


def job(name: str, code: str, limit: float = 20, **how) -> steps.Job:
    return steps.Job(name, steps.python("-c", code), limit, **how)


class TestSteps:
    def test_a_failure_is_shown_and_later_steps_run(self, runner, capsys):
        runner.run(job("first", "print('broken here'); raise SystemExit(3)"))
        runner.run(job("second", "import os; print(os.environ['COLOUR'])", environment={"COLOUR": "red"}))
        assert [(s.name, s.status, s.detail) for s in runner.done] == [
            ("first", "FAILED", "exit status 3: broken here"),
            ("second", "passed", "red"),
        ]
        assert "broken here\nfirst: FAILED" in capsys.readouterr().out
        assert "==== first: FAILED" in runner.log.read_text()
        assert "red" in runner.log.read_text()

    @pytest.mark.parametrize(("may_be_cut", "status"), [(False, "FAILED"), (True, "not run")])
    def test_the_limit_ends_a_step_and_what_it_started(self, runner, tmp_path, may_be_cut, status):
        written = tmp_path / "late"
        late = f"import time; time.sleep(1.2); open({str(written)!r}, 'w')"
        code = f"import subprocess, sys; print('begun', flush=True); subprocess.run([sys.executable, '-c', {late!r}])"
        runner.run(job("slow", code, limit=0.7, may_be_cut=may_be_cut))
        assert (runner.done[0].status, runner.done[0].detail) == (status, "stopped after 1 s: begun")
        assert "begun" in runner.log.read_text()
        time.sleep(0.8)
        assert not written.exists()

    def test_steps_run_together(self, runner):
        started = time.monotonic()
        runner.run(*(job(f"{i}", "import time; time.sleep(1)") for i in range(3)))
        assert [step.status for step in runner.done] == ["passed"] * 3
        assert time.monotonic() - started < 2.9

    def test_what_is_missing_or_late_is_not_run(self, runner, tmp_path):
        runner.run(job("needy", "", needs=("numpy", "no_such_module")))
        late = steps.Steps(tmp_path / "work", tmp_path / "late.log", tmp_path, seconds=4)
        late.run(job("late", ""))
        assert [(s.status, s.detail) for s in (*runner.done, *late.done)] == [
            ("not run", "needs no_such_module"),
            ("not run", "no time left"),
        ]

    @pytest.mark.parametrize(
        ("status", "line", "verdict"),
        [
            (0, "== 5 passed, 2 skipped in 3.1s ==", "passed"),
            (0, "== 2 skipped in 3.1s ==", "FAILED"),
            (1, "== 1 failed, 5 passed in 3.1s ==", "FAILED"),
            (5, "== no tests ran in 0.1s ==", "FAILED"),
        ],
    )
    def test_tests_must_run(self, status, line, verdict):
        assert gpu_check.tests_passed(status, f"....\n{line}\n")[0] == verdict

    def test_time_is_kept_for_later_steps(self, tmp_path):
        late = steps.Steps(tmp_path / "work", tmp_path / "late.log", tmp_path, seconds=30)
        late.run(job("long", "import time; print('begun'); time.sleep(9)", least=0, keep=29))
        late.run(job("none", "", keep=28))
        late.run(job("kept", ""))
        assert [(s.status, s.detail) for s in late.done] == [
            ("FAILED", "stopped after 1 s: begun"),
            ("not run", "no time left"),
            ("passed", "(no output)"),
        ]

    def test_exit_status(self):
        passed, failed, missed = (steps.Step(s, s, 0.0, "") for s in (steps.PASSED, steps.FAILED, steps.NOT_RUN))
        assert gpu_check.exit_status([passed], set()) == 0
        assert gpu_check.exit_status([passed, missed], {missed.name}) == 0
        assert gpu_check.exit_status([passed, missed], set()) == 3
        assert gpu_check.exit_status([passed, missed, failed], set()) == 1


class TestThePlan:
    def plan(self, *arguments: str) -> list[steps.Job]:
        return gpu_check.plan(gpu_check.parsed(["--device", "cpu", *arguments]))

    def order(self, jobs: list[steps.Job], *passed: str) -> list[str]:
        """Returns the names of the measurements that run where these steps passed."""
        return [job.name for job in jobs if job.stage == steps.MEASUREMENT and job.is_due(passed)]

    def test_the_most_important_come_first(self):
        jobs = self.plan()
        first = ["eval-bf16-8", "training-bf16-8", "layers-bf16-8"]
        compilations = [job.name for job in jobs if job.name.startswith("compile ")]
        assert compilations == [f"compile {name}" for name in first]
        every = self.order(jobs, *compilations)
        assert every[:4] == [*first, "operators-bf16-8"]
        assert not [name for name in every if name.removesuffix("-uncompiled") in first and name not in first]
        sizes = itertools.product(("eval", "training"), ("bf16", "tf32"), (1, 8, 32))
        assert {f"{what}-{precision}-{size}" for what, precision, size in sizes} <= set(every)
        assert len(set(every)) == len(every)

    def test_what_is_not_compiled_yet_comes_last(self):
        every = self.order(self.plan("--fast"), "compile eval-bf16-8")
        first = ["eval-bf16-8", "training-bf16-8-uncompiled", "layers-bf16-8-uncompiled", "operators-bf16-8"]
        assert every[:4] == first
        assert every[-2:] == ["training-bf16-8", "layers-bf16-8"]
        assert self.order(self.plan("--only", "training-bf16-8")) == ["training-bf16-8"]

    def test_every_part_has_a_command(self):
        jobs = self.plan()
        assert jobs[0].name == "prepare"
        for job in jobs[1:]:
            given = gpu_measure.parsed(job.command[3:])
            assert job.writes == given.work / f"{given.name}.jsonl"
            assert all(callable(gpu_measure.suite(name, "bf16", 2, given.baseline)) for name in given.suites)

    def test_time_is_kept_where_something_is_measured(self):
        (compared,) = self.plan("--only", "agreement bf16")[1:]
        assert (compared.stage, compared.keep) == (steps.TOGETHER, 0)
        assert self.plan("--only", "agreement bf16", "eval-bf16-8")[1].keep == 60 * 8 * 0.4


class TestTheTests:
    def test_are_there(self):
        named = [str(word) for job in gpu_check.tests(fast=False) for word in job.command]
        files = [word.split("::")[0] for word in named if word.startswith("tests/")]
        assert all((gpu_check.ROOT / file).exists() for file in files)
        assert {"tests/gpu", "tests/test_compiled.py", "tests/gpu/test_device.py"} <= set(files)
        assert f"{gpu_check.REPEATED}(" in (gpu_check.ROOT / "tests/gpu/test_device.py").read_text()

    def test_find_the_package(self, runner):
        path = gpu_check.tests(fast=True)[0].environment
        runner.run(job("import", "import spade_kernels; print(spade_kernels.__file__)", environment=path))
        assert runner.done[0].detail == str(gpu_check.ROOT / "spade_kernels" / "__init__.py")

    def test_leave_out_what_needs_no_gpu(self, runner, tmp_path):
        (tmp_path / "test_it.py").write_text(
            "import pytest\n"
            "@pytest.mark.parametrize('backend', ['reference', 'cpu', 'triton', 'cuda'])\n"
            "def test_agrees_with_the_reference(backend): pass\n"
            "def test_hundred_times_under_load(): pass\n"
            "def test_cpu(): pass\n"
        )
        chosen = dataclasses.replace(gpu_check.pytest("tests", *gpu_check.CHOSEN, str(tmp_path)), needs=())
        runner.run(chosen)
        assert "3 passed, 3 deselected" in runner.done[0].detail
        assert "test_agrees_with_the_reference[cuda] PASSED" in runner.log.read_text()


CLEAN = """========= COMPUTE-SANITIZER
gpu_sanitize: reached the end after cuda 40, triton 47
========= ERROR SUMMARY: 0 errors
"""
WRONG_WRITE = """========= COMPUTE-SANITIZER
========= Invalid __global__ write of size 4 bytes
=========     at void spade::cuda::run<spade::cuda::Forward<float, 4>>(T1)+0x1c0 in modulate.cu:40
=========     by thread (0,0,0) in block (0,0,0)
gpu_sanitize: reached the end after cuda 40, triton 47
========= ERROR SUMMARY: 2 errors
"""
RACE = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _sum_pieces+0x50 and Read access at _sum_pieces+0x90
gpu_sanitize: reached the end after cuda 40, triton 47
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""


@pytest.mark.parametrize(
    ("tool", "status", "output", "verdict", "detail"),
    [
        ("memcheck", 0, CLEAN, "passed", "memcheck ran over calls of cuda 40, triton 47 and found nothing"),
        (
            "racecheck",
            0,
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors"),
            "passed",
            "triton 47",
        ),
        (
            "memcheck",
            0,
            WRONG_WRITE,
            "FAILED",
            "2 findings, in void spade::cuda::run<spade::cuda::Forward<float, 4>>(T1)",
        ),
        ("racecheck", 0, RACE, "FAILED", "1 findings, in _sum_pieces"),
        # A tool that is not there, or took no part, prints no summary of its own.
        ("memcheck", 127, "sh: compute-sanitizer: not found", "FAILED", "did not run"),
        ("initcheck", 0, "gpu_sanitize: reached the end after cuda 40, triton 47\n", "FAILED", "did not run"),
        ("memcheck", 0, CLEAN.replace("triton 47", "triton 0"), "FAILED", "no call of triton"),
        ("memcheck", 0, CLEAN.replace("cuda 40, ", ""), "FAILED", "no call of cuda"),
        ("racecheck", 0, CLEAN, "FAILED", "did not run"),
        (
            "synccheck",
            1,
            "Traceback\nValueError: no\n========= ERROR SUMMARY: 0 errors\n",
            "FAILED",
            "not reach its end",
        ),
        ("memcheck", 1, CLEAN, "FAILED", "exit status 1"),
        ("memcheck", 0, CLEAN + "========= Internal Sanitizer Error: 3\n", "FAILED", "itself failed"),
    ],
)
def test_a_sanitizer_must_have_run_and_found_nothing(tool, status, output, verdict, detail):
    judged, why = sanitizers.judge(tool, status, output)
    assert judged == verdict
    assert detail in why


def test_every_tool_has_a_command():
    commands = [sanitizers.job(tool, 60).command for tool in sanitizers.TOOLS]
    assert [command[3] for command in commands] == ["memcheck", "racecheck", "initcheck", "synccheck"]
    assert all(command[-2:] == ["-m", gpu_sanitize.__name__] for command in commands)


def test_a_tool_that_is_not_there_fails(runner, monkeypatch):
    monkeypatch.setattr(sanitizers, "program", lambda: "no-such-sanitizer")
    runner.run(sanitizers.job("memcheck", 60))
    assert runner.done[0].status == "FAILED"
    assert runner.done[0].detail == "memcheck printed no summary: it did not run (exit status 127)"


def test_what_the_sanitizers_watch_runs_every_operator(capsys):
    called = {call.name for call in gpu_sanitize.calls()}
    assert called == {*operators.backends.operators_of("cuda"), *operators.backends.operators_of("triton")}
    status = gpu_sanitize.main(["--device", "cpu"])
    last = capsys.readouterr().out.splitlines()[-1:]
    there = operators.backends_on(CPU) != ["reference"]
    assert status == (0 if there else 1)
    assert bool(last and last[0].startswith(sanitizers.END)) == there


class TestTimes:
    def test_providers_and_arguments_take_turns(self):
        seen: list[tuple[str, int]] = []
        runs = {name: (lambda argument, name=name: seen.append((name, argument))) for name in ("a", "b")}
        times = dataclasses.replace(tiny({}), repeats=4, seconds=60).times(runs, [1, 2, 3])
        assert seen[4:] == [(name, argument) for argument in (1, 2, 3, 1) for name in ("a", "b")]
        assert {name: len(values) for name, values in times.items()} == {"a": 4, "b": 4}

    def test_every_argument_is_timed_however_long_it_takes(self):
        times = clock.interleave({"a": lambda _: time.sleep(0.01)}, list(range(5)), rounds=30, seconds=0)
        assert len(times["a"]) == 5
        assert min(times["a"]) >= 10

    @pytest.mark.parametrize(
        ("precision", "expected"), [("tf32", (True, True)), ("ieee", (False, False)), ("shipped", (False, True))]
    )
    def test_float32_products(self, precision, expected):
        def now() -> tuple[bool, bool]:
            return torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32

        before = now()
        with clock.float32_products(precision):
            assert now() == expected
            assert (torch.backends.cuda.matmul.fp32_precision == "tf32") == expected[0]
        assert now() == before

    def test_copies_go_beyond_the_cache(self, monkeypatch):
        assert calls.copies_beyond_cache(1, CPU) == 2
        properties = type("Properties", (), {"L2_cache_size": 50 << 20})
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        for nbytes, count in ((100 << 20, 2), (30 << 20, 5), (1 << 10, 64)):
            assert calls.copies_beyond_cache(nbytes, torch.device("cuda")) == count
        first, second = calls.rotated((torch.ones(2), None, 3), 2)
        assert torch.equal(first[0], second[0])
        assert first[0].data_ptr() != second[0].data_ptr()
        assert first[1:] == second[1:] == (None, 3)


class Streams:
    """Stands in for torch.cuda in a capture, and says on which stream each thing happened."""

    def __init__(self) -> None:
        self.current, self.seen = "default", []

    def Stream(self) -> Streams:
        return self

    def wait_stream(self, other: object) -> None:
        self.seen.append("wait")

    def current_stream(self) -> Streams:
        return self

    @contextlib.contextmanager
    def stream(self, stream: Streams) -> Iterator[None]:
        self.current = "side"
        yield
        self.current = "default"

    def CUDAGraph(self) -> Streams:
        return self

    @contextlib.contextmanager
    def graph(self, graph: Streams, stream: Streams) -> Iterator[None]:
        self.seen.append("capture")
        yield


def test_everything_runs_on_the_stream_of_the_capture(monkeypatch):
    streams, device = Streams(), torch.device("cuda")
    for name in ("Stream", "current_stream", "stream", "CUDAGraph", "graph"):
        monkeypatch.setattr(torch.cuda, name, getattr(streams, name))
    with torch.backends.cudnn.flags(), clock.settled(device):
        clock.Captured(lambda: streams.seen.append(streams.current), device)
    assert streams.seen == ["wait", "side", "side", "side", "side", "capture", "side", "wait"]


class TestBatches:
    def test_images_are_not_repeated(self):
        three = [random_label_map("blobs", (1, 16, 16), 5, edges=True, seed=seed) for seed in range(3)]
        found = masks.batches(three, 4, 3)
        assert [mask.shape for mask in found] == [(4, 16, 16)] * 3
        assert len({tuple(image.flatten().tolist()) for mask in found for image in mask.labels}) == 12

    def test_a_place_that_most_fit_in(self):
        kinds = ("constant", "noise", "blobs")
        found = [random_label_map(kind, (1, 32, 32), 9) for kind in kinds]
        place, fitting = workload.place_for(found, lambda mask: mask.prepare([(32, 32)]))
        assert fitting == found
        assert len(place.label_map.window_index((32, 32), 3).modulation) == 32 * 32

    def test_masks_come_back(self, tmp_path):
        kinds = {
            "toy": [random_label_map("blobs", (1, 8, 8), 5, edges=True)],
            "noise": [random_label_map("noise", (1, 8, 8), 5)],
        }
        masks.save_masks(kinds, tmp_path / "masks.pt")
        found = masks.load_masks(tmp_path / "masks.pt")
        assert list(found) == ["toy", "noise"]
        assert torch.equal(found["toy"][0].one_hot(), kinds["toy"][0].one_hot())
        assert found["noise"][0].edges is None


def wrong_image(mask: LabelMap) -> torch.Tensor:
    return torch.linspace(1.2, 0, 8)


def no_image(mask: LabelMap) -> torch.Tensor:
    raise torch.OutOfMemoryError("no memory for it")


def test_who_errs_or_fails_is_left_out():
    exact, mask = torch.linspace(1, 0, 8), random_label_map("constant", (1, 8, 8), 2)
    right = {"tuned": lambda mask: exact + 0.01, "ours": lambda mask: exact + 0.015, "spade-free": wrong_image}
    runs = right | {"baseline": wrong_image, "ours-replay": lambda mask: exact * float("nan"), "original": no_image}
    work = tiny({"toy": [mask]})
    may_fail = functools.partial(work.may_fail, case="toy", runs=runs)
    verification.check_images(runs, lambda mask: exact, right["tuned"], [mask, mask], 1e-3, may_fail)
    assert runs == right
    assert work.failed.keys() == {"baseline", "ours-replay", "original"}
    assert work.failed["original"] == "toy: OutOfMemoryError: no memory for it"
    assert "from the exact image" in work.failed["baseline"]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpu_check")
    gpu_measure.prepare(folder, "", CPU, ngf=2, size=64)
    return folder


def tiny(kinds: dict) -> workload.Workload:
    return workload.Workload(CPU, 2, kinds, 2, repeats=3, seconds=0.1)


@pytest.fixture
def measured(prepared):
    """Runs a part on tiny networks; its results by (suite, provider)."""

    def run(part: Callable[[workload.Workload], Iterator[Result]]) -> dict[tuple[str, str], list[Result]]:
        gpu_measure.measure(prepared / "part.jsonl", part, tiny(masks.load_masks(prepared / "masks.pt")))
        found: dict[tuple[str, str], list[Result]] = {}
        for one in results.PartFile(prepared / "part.jsonl").results():
            found.setdefault((one.suite, one.provider), []).append(one)
        assert all(0 < one.p20 <= one.p50 <= one.p80 for each in found.values() for one in each)
        return found

    return run


@pytest.fixture
def left_out(prepared):
    """Returns which providers the last part left out, and why."""
    return results.PartFile(prepared / "part.jsonl").failures


class TestParts:
    @pytest.mark.parametrize("what", ["compile-eval", "compile-training", "compile-layers"])
    def test_compilations_measure_nothing(self, measured, what):
        assert measured(gpu_measure.suite(what, "bf16", 2, with_baseline=True)) == {}

    def test_preparation(self, prepared):
        about = json.loads(gpu_check.about(prepared).read_text())
        assert list(about["settings"]["distinct windows"]) == ["toy", "busiest", "noise"]
        assert about["environment"]["torch"] == torch.__version__

    def test_eval(self, measured):
        found = measured(lambda work: evaluation.evaluation(work, "tf32", 2, with_baseline=True))
        cases = {provider: {r.case for r in each} for (_, provider), each in found.items()}
        every = {f"{kind}, tf32, batch 2" for kind in ("toy", "busiest", "noise")}
        for name in ("original", "tuned", "baseline", "spade-free", "ours", "ours-indexed", "ours-replay"):
            assert cases[name] == every, name
        assert cases["ours-dense"] == {"noise, tf32, batch 2"}

    def test_training(self, measured):
        found = measured(lambda work: training.training(work, "bf16", 2, with_baseline=False))
        stocks = {"original", "tuned", "spade-free"}
        assert {provider for _, provider in found} == stocks | {"ours", "ours-indexed", "ours-replay"}

    def test_ours_compiled(self, measured):
        found = measured(lambda work: compilation.both_compiled(work, "bf16", 2))
        for suite in (EVAL, TRAINING):
            assert {"ours", "ours-compiled", "baseline"} <= {provider for of, provider in found if of == suite}

    @pytest.mark.parametrize("gradients", [False, True])
    def test_layers(self, measured, gradients):
        found = measured(lambda work: layers.layers(work, "bf16", training=gradients, with_baseline=False))
        for each in found.values():
            assert len(each) == 11
            assert each[-1].case == f"{ALL_LAYERS}, bf16, batch 2"

    def test_operators(self, measured):
        found = measured(lambda work: operators.operators(work, "tf32"))
        every = [r.case for r in found[results.OPERATOR, "reference"] if ALL_LAYERS in r.case]
        assert len(every) == len(set(every)) == 9
        assert (results.BANDWIDTH, "copy") in found
        assert (results.PRODUCTS, "matmul") in found

    def test_window_indexes(self, measured):
        found = measured(operators.window_index)
        suites = (results.GPU_INDEX, results.INDEX_GROUPS, results.LABEL_MAP)
        assert set(found) == {(suite, name) for suite in suites for name in operators.backends_on(CPU)}

    def test_a_wrong_operator_is_not_timed(self, measured, left_out, monkeypatch):
        monkeypatch.setattr(operators, "relative_error", lambda got, exact: float(got.shape[-1] == 128))
        found = measured(lambda work: operators.operators(work, "bf16"))
        names = {r.case.split(",")[0] for r in found[results.OPERATOR, "reference"]}
        assert "modulate" in names
        assert "gather_sum" not in names
        assert "gather_sum, 32 x 2 x 2, bf16, batch 2: AssertionError: errors [1.0]" in left_out()["reference"]

    @pytest.mark.parametrize("measure", [evaluation.evaluation, training.training])
    def test_a_compiler_that_fails_keeps_nobody_else_from_being_timed(self, measured, left_out, monkeypatch, measure):
        for suite in (evaluation, training):
            monkeypatch.setattr(suite, "compiled", lambda function, device: no_image)
        found = measured(lambda work: measure(work, "bf16", 2, with_baseline=True))
        assert {"ours", "ours-indexed", "tuned", "original", "spade-free"} == {who for _, who in found} - {
            "ours-replay",
            "ours-dense",
        }
        assert left_out() == {"baseline": "toy, bf16, batch 2: OutOfMemoryError: no memory for it"}

    def test_layers_without_one_that_fails(self, measured, left_out, monkeypatch):
        monkeypatch.setattr(layers, "freeze", no_image)
        found = measured(lambda work: layers.layers(work, "bf16", training=False, with_baseline=False))
        assert found.keys() == {(layers.LAYER, "tuned")}
        assert left_out().keys() == {"ours"}

    def test_networks_are_timed_from_where_they_were(self, prepared):
        work = tiny(masks.load_masks(prepared / "masks.pt"))
        trained = training.Training(work, "tf32", 2)
        trained.add("ours", "tuned")
        for run in map(trained._from_the_start, trained.runs.values()):
            first, second = run(trained.found[0]), run(trained.found[0])
            assert torch.equal(first, second)

    def test_shapes_are_the_generators(self):
        assert sum(shapes.layer_shapes(64, 256).values()) == 18
        assert shapes.layer_shapes(64, 256)[128, 256, 2] == 2


def test_the_whole_command(tmp_path, capfd, monkeypatch):
    how = ["--device", "cpu", "--tiny", "--dataroot", "", "--work", str(tmp_path / "work"), "--out", str(tmp_path)]
    assert gpu_check.main([*how, "--only", "operators-tf32-2"]) == 0
    printed = capfd.readouterr().out
    rows = [line.split() for line in printed.splitlines()[-6:] if line]
    assert [row[:2] for row in rows[:2]] == [["prepare", "passed"], ["operators-tf32-2", "passed"]]
    assert " ".join(rows[2]).startswith("bounds not run")
    assert printed.splitlines()[-1].endswith("gpu_check.log")
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert {step["status"] for step in content["steps"]} == {"passed"}
    assert content["failed"] == {}
    assert load_runs(path)[0].find(results.OPERATOR, f"modulate, {ALL_LAYERS}, tf32, batch 2", "reference")


def test_masks_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "DATAROOTS", [tmp_path / "none", tmp_path])
    assert gpu_check.parsed([]).dataroot == str(tmp_path)
    monkeypatch.setattr(gpu_check, "DATAROOTS", [tmp_path / "none"])
    assert gpu_check.parsed([]).dataroot == ""


def test_sources_are_told_apart(tmp_path):
    file = tmp_path / "csrc" / "cuda" / "modulate.cu"
    file.parent.mkdir(parents=True)
    file.write_text("first")
    first = environment.sources(tmp_path)
    assert environment.sources(tmp_path) == first
    file.write_text("second")
    assert environment.sources(tmp_path) != first


def test_packages_that_measuring_does_not_need(runner):
    missing = "sys.modules.update(dict.fromkeys(('matplotlib', 'jinja2', 'safetensors', 'tqdm')))"
    # The kernels are built after gpu_check has started.
    first = "from benchmarks import gpu_check; assert 'spade_kernels' not in sys.modules"
    code = f"import sys; {missing}; {first}; from benchmarks import gpu_measure, gpu_report; print('imported')"
    runner.run(job("import", code, environment={"PYTHONPATH": str(gpu_check.ROOT)}))
    assert runner.done[0].detail == "imported"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys):
    assert gpu_check.main([]) == 2
    assert "not run: there is no GPU" in capsys.readouterr().err
