"""The benchmark: it compares the same functions, counts right, and says so when a bound is missed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from command import assert_refused
from PIL import Image
from torch import nn

from benchmarks import busy
from spade_kernels import LabelMap
from spade_kernels.testing import random_label_map, relative_error
from spade_model.benchmark import results
from spade_model.benchmark.clock import interleave
from spade_model.benchmark.masks import bench_masks, distinct_fraction
from spade_model.benchmark.memory import saved_by_spade
from spade_model.benchmark.providers import eval_runs, settled_generator, training_networks
from spade_model.benchmark.results import BenchRun, Result, load_runs, save_runs
from spade_model.benchmark.stock import StockSPADE, one_hot, stock_generator
from spade_model.benchmark.targets import Target, judge
from spade_model.benchmark.verification import verify
from spade_model.config import default_data_config

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
TINY = ("--ngf", "2", "--masks", "1", "--repeats", "1", "--crop_size", "64")


@pytest.fixture
def mask() -> LabelMap:
    return random_label_map("blobs", (1, 64, 64), 5, edges=True)


@pytest.fixture
def generator(mask):
    return settled_generator(mask, ngf=2).double()


def test_all_providers_compute_the_same_image(mask, generator):
    runs = eval_runs(generator, ("eager", "tuned", "ours", "ours-dense"))
    assert list(runs) == ["eager", "tuned", "ours", "ours-dense"]
    assert max(verify(runs, mask, limit=1e-10).values()) < 1e-10


def test_all_providers_compute_the_same_image_in_training(mask, generator):
    networks = training_networks(generator, ("eager", "tuned", "ours"))
    images = {name: network(mask) for name, network in networks.items()}
    assert images["eager"].requires_grad
    for name in ("tuned", "ours"):
        assert relative_error(images[name], images["eager"]) < 1e-10


def test_a_wrong_provider_is_not_timed():
    with pytest.raises(AssertionError, match=r"nothing is timed: \{'ours'"):
        verify({"eager": torch.Tensor.double, "ours": lambda x: x.double() + 0.1}, torch.ones(3))


def test_spade_free_has_no_spade_arithmetic(mask, generator):
    free = stock_generator(generator.eval(), "spade-free", training=False)
    kinds = {type(module) for module in free.modules()}
    assert not kinds & {StockSPADE, nn.BatchNorm2d}
    # The first feature map sees every 32nd pixel; nothing else of the mask is left.
    changed = mask.labels.clone()
    changed[:, 1:32, 1:32] = 0
    other = LabelMap(changed, mask.num_labels, mask.edges)
    assert torch.equal(free(mask), free(other))
    eager = stock_generator(generator, "eager", training=False)
    assert not torch.equal(eager(mask), eager(other))


def test_packed_convolutions_do_not_change_the_spade_free_network(mask):
    runs = eval_runs(settled_generator(mask, ngf=32), ("spade-free", "spade-free-packed"))
    assert relative_error(runs["spade-free-packed"](mask), runs["spade-free"](mask)) < 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_stock_planes_are_the_label_maps(mask, memory_format):
    planes = one_hot(mask, memory_format=memory_format)
    assert torch.equal(planes, mask.one_hot())
    assert planes.is_contiguous(memory_format=memory_format)
    assert torch.equal(one_hot(mask, (3, 7)), F.interpolate(planes, size=(3, 7), mode="nearest"))


def test_masks_of_every_kind_fit_one_generator(coco_dir):
    data = replace(default_data_config("coco"), dataroot=str(coco_dir), crop_size=64)
    kinds = bench_masks(data, 2)
    assert {kind: len(masks) for kind, masks in kinds.items()} == {
        "real": 2,
        "toy": 1,
        "busiest": 1,
        "noise": 1,
        "constant": 1,
    }
    assert {(mask.channels, mask.shape) for masks in kinds.values() for mask in masks} == {(184, (1, 64, 64))}
    fractions = {kind: distinct_fraction(masks[0], (64, 64)) for kind, masks in kinds.items()}
    assert fractions["constant"] < fractions["real"] <= fractions["busiest"] < fractions["noise"] == 1


def test_providers_take_turns():
    turns: list[tuple[str, int]] = []
    runs = {name: (lambda mask, name=name: turns.append((name, mask))) for name in ("a", "b")}
    times = interleave(runs, [1, 2], rounds=4)
    assert turns == [("a", 1), ("b", 1), ("a", 2), ("b", 2)] * 2
    assert [len(values) for values in times.values()] == [4, 4]


def test_bytes_saved_by_a_stock_layer(mask):
    channels, pixels = 8, 16 * 16
    layer = StockSPADE(channels, mask.channels)
    x = torch.randn(1, channels, 16, 16, requires_grad=True)
    layer.register_forward_pre_hook(lambda _, args: (x, one_hot(args[0])))
    # x, normalized, 1 + gamma; hidden; planes; mean and 1/std. No weights, and every storage once.
    floats = 3 * channels * pixels + 128 * pixels + mask.channels * pixels + 2 * channels
    assert saved_by_spade(layer, mask) == 4 * floats / 1e6


def test_bytes_saved_by_ours_leave_out_plain_convolutions(mask):
    networks = training_networks(settled_generator(mask, ngf=8), ("ours", "spade-free"))
    assert 0 < saved_by_spade(networks["ours"], mask) < 100
    assert saved_by_spade(networks["spade-free"], mask) == 0


def _run(**medians: float) -> BenchRun:
    lines = [Result(results.EVAL, "real", name.replace("_", "-"), "ms", p, p, p, 1) for name, p in medians.items()]
    return BenchRun({"allocator": "default"}, {"distinct windows": {"real": {}}}, lines)


def test_percentiles():
    result = Result.of(results.EVAL, "real", "ours", [1.0, 2.0, 3.0, 4.0, 10.0, 6.0], layers=2)
    assert (result.p20, result.p50, result.p80, result.count) == (2.0, 3.5, 6.0, 6)
    single = Result.of(results.SAVED, "real", "ours", [7.0], "MB")
    assert (single.p20, single.p50, single.p80, single.unit) == (7.0, 7.0, 7.0, "MB")


@pytest.mark.parametrize(
    ("bound", "must", "word"),
    [(">=", 2.5, "met"), (">=", 2.6, "missed"), ("<=", 2.5, "met"), ("<=", 2.4, "missed"), ("<", 2.5, "missed")],
)
def test_bounds(bound, must, word):
    (verdict,) = judge(_run(eager=5.0, ours=2.0), (Target(results.EVAL, "eager", "ours", bound, must, must),))
    assert (verdict.measured, verdict.word) == (2.5, word)


def test_bounds_without_measurement_or_limit():
    targets = (Target(results.EVAL, "eager", "ours", ">=", 6, 8), Target(results.EVAL, "ours", "tuned"))
    missing, reported = judge(_run(ours=2.0, tuned=4.0), targets)
    assert (missing.measured, missing.word) == (None, "not run")
    assert (reported.measured, reported.word) == (0.5, "reported")


def test_results_come_back_from_their_file(tmp_path):
    run = _run(eager=5.0, ours=2.0)
    save_runs([run], tmp_path / "new" / "results.json")
    assert load_runs(tmp_path / "new" / "results.json") == [run]


def test_spade_bench(spade, tmp_path):
    out = tmp_path / "bench.json"
    done = spade("bench", *TINY, "--out", out)
    assert done.status == 0, done
    assert "SPADEGenerator ngf 2, 64 x 64 pixels, 8 condition channels" in done.out
    assert "eager / ours" in done.out
    legend = [line.partition(":")[0] for line in done.out.rstrip().rpartition("\n\n")[2].splitlines()]
    assert legend == ["eager", "tuned", "ours", "spade-free"]
    (run,) = load_runs(out)
    providers = {r.provider for r in run.results if r.suite == results.TRAINING}
    assert providers == {"eager", "tuned", "ours", "spade-free"}
    suites = {r.suite for r in run.results}
    assert {results.EVAL, results.TRAINING, results.SAVED} <= suites
    assert all(0 < r.p20 <= r.p50 <= r.p80 for r in run.results)
    assert run.environment["torch"] == torch.__version__


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (("--repeats", "0"), ("--repeats 0 is too small",)),
        (("--dataroot", "nowhere"), ("nowhere",)),
    ],
)
def test_spade_bench_refuses(spade, arguments, fragments):
    assert_refused(spade("bench", *TINY, *arguments), *fragments)


def test_spade_bench_refuses_rgb_conditions(spade, tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "condition.png")
    data = ("--dataset_mode", "custom", "--label_dir", tmp_path, "--label_nc", "0", "--no_instance")
    assert_refused(spade("bench", *TINY, *data), "nothing to compare for an RGB condition")


def test_spade_bench_finds_out_first_that_it_cannot_write(spade, tmp_path):
    (tmp_path / "file").write_text("")
    assert_refused(spade("bench", *TINY, "--out", tmp_path / "file" / "out.json"), "cannot write the results to")


def _report(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, str(BENCHMARKS / "report.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def _timing(case: str, provider: str, milliseconds: float, layers: int) -> dict:
    info = {"suite": results.DENSE, "case": case, "provider": provider, "extra": {"layers": layers}}
    return {"extra_info": info, "stats": {"median": milliseconds / 1e3}}


def test_report_sums_the_layers_and_judges(tmp_path):
    environment = {"device": "A CPU", "threads": 2, "isa": "AVX2", "torch": "2", "date": "today", "commit": None}
    settings = {"ngf": 64, "channels": 184, "masks": 1, "distinct windows": {"toy": {"256 x 256": 0.1}}}
    timings = [
        _timing(case, provider, time, layers)
        for case, layers, times in (
            ("a", 2, {"eager": (1, 2), "ours": (1, 1)}),
            ("b", 1, {"eager": (3, 3), "ours": (4, 5)}),
        )
        for provider, repeats in times.items()
        for time in repeats
    ]
    file = tmp_path / "timings.json"
    file.write_text(
        json.dumps(
            {
                "spade": {"environment": environment | {"allocator": "default"}, "settings": settings},
                "benchmarks": timings,
            }
        )
    )
    done = _report(file, "--out", tmp_path, "--plots", tmp_path / "plots")
    assert done.returncode == 0, done.stderr
    (run,) = load_runs(tmp_path / "a-cpu-2-threads.json")
    # 2 a + b in each repeat: eager 5 and 7, ours 6 and 7.
    medians = [run.find(results.DENSE, results.ALL_LAYERS, name) for name in ("eager", "ours")]
    assert [m.p50 for m in medians if m] == [6.0, 6.5]
    row = next(line for line in done.stdout.splitlines() if "all 18: eager / ours" in line)
    assert "0.923 missed" in row
    assert "None" not in done.stdout, "results from outside a checkout name no commit"
    assert len(list((tmp_path / "plots").iterdir())) == 1
    assert _report(tmp_path / "a-cpu-2-threads.json").stdout == done.stdout


def test_report_refuses_other_files(tmp_path):
    (tmp_path / "other.json").write_text("{}")
    done = _report(tmp_path / "other.json")
    assert (done.returncode, done.stdout) == (2, "")
    assert "does not hold results" in done.stderr


def test_suites_can_be_collected_and_the_operators_run(tmp_path):
    suites = sorted(str(path) for path in BENCHMARKS.glob("bench_*.py"))
    options = ["-q", "-p", "no:cacheprovider", "--ngf", "2", "--masks", "1", "--repeats", "2", "--crop-size", "64"]
    command = [sys.executable, "-m", "pytest", *options]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    listed = subprocess.run([*command, "--collect-only", *suites], capture_output=True, text=True, env=environment)
    assert listed.returncode == 0, listed.stdout
    file = tmp_path / "ops.json"
    ops = [*command, "--benchmark-quiet", "--benchmark-json", str(file), str(BENCHMARKS / "bench_ops.py")]
    done = subprocess.run(ops, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout
    assert "window indexes, one thread, toy: ours" in _report(file).stdout


def test_steps_beside_busy_processes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(busy, "BUSY", (1,))
    busy.main(["--size", "64", "--ngf", "4", "--steps", "1", "--repeats", "1", "--out", str(tmp_path)])
    _, _, *rows = capsys.readouterr().out.splitlines()
    assert [row.split(" | ")[0] for row in rows[:2]] == [
        "| 1 busy processes, active waiting",
        "| 1 busy processes, passive waiting",
    ]
    (file,) = tmp_path.iterdir()
    (run,) = load_runs(file)
    assert {result.provider for result in run.results} == {"eager", "ours"}
