"""Measures the time of a training step and the memory of training."""

from __future__ import annotations

import pytest

from benchmarks import scheduling
from spade_model.benchmark import providers, results
from spade_model.benchmark.memory import peak_of_step, saved_by_spade
from spade_model.benchmark.training import STEPS, step_run


def pytest_generate_tests(metafunc):
    scheduling.generate(metafunc, "repeat, provider")


class TestStep:
    """Times training steps. Outputs are not compared, because rounding decides the signs of Adam's first updates."""

    @staticmethod
    def schedule(config):
        return [(repeat, provider) for repeat in range(scheduling.long_repeats(config)) for provider in STEPS]

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        mask, ngf = scheduling.first_mask(pytestconfig), pytestconfig.getoption("ngf")
        runs = {name: step_run(name, mask, ngf) for name in STEPS}
        for run in runs.values():
            run(mask)
        return runs

    def test_step(self, benchmark, pytestconfig, runs, repeat, provider):
        mask = scheduling.first_mask(pytestconfig)
        scheduling.timed(
            benchmark, lambda: runs[provider](mask), results.STEP, scheduling.main_kind(pytestconfig), provider
        )


class TestSaved:
    @staticmethod
    def schedule(config):
        return [(0, provider) for provider in ("eager", "tuned", "ours")]

    def test_saved(self, benchmark, pytestconfig, repeat, provider):
        kind = scheduling.main_kind(pytestconfig)
        masks = scheduling.masks(pytestconfig)[kind]
        generator = providers.settled_generator(masks[0], pytestconfig.getoption("ngf"))
        network = providers.training_networks(generator, [provider])[provider]
        mean = sum(saved_by_spade(network, mask) for mask in masks) / len(masks)
        scheduling.noted(benchmark, mean, "MB", results.SAVED, kind, provider)


class TestPeak:
    @staticmethod
    def schedule(config):
        return [(0, provider) for provider in ("eager", "ours")]

    def test_peak(self, benchmark, pytestconfig, repeat, provider):
        peak = peak_of_step(provider, scheduling.first_mask(pytestconfig), pytestconfig.getoption("ngf"))
        if peak is None:
            pytest.skip("this system does not report the peak memory of a process")
        scheduling.noted(benchmark, peak, "MB", results.PEAK, scheduling.main_kind(pytestconfig), provider)
