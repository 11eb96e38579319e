"""Times the generator, from labels to the image and from labels to gradients.

A timed call includes all work that depends on the mask: one-hot planes or window indexes.
"""

from __future__ import annotations

import pytest

from benchmarks import scheduling
from spade_model.benchmark import providers, results
from spade_model.benchmark.masks import distinct_fraction
from spade_model.benchmark.verification import verify


def pytest_generate_tests(metafunc):
    scheduling.generate(metafunc, "repeat, kind, number, provider")


class TestEval:
    @staticmethod
    def schedule(config):
        kinds, repeats = scheduling.masks(config), config.getoption("repeats")
        return [
            (repeat, kind, number, provider)
            for repeat in range(repeats)
            for kind, masks in kinds.items()
            # The other kinds of masks get half as many repeats, because no target depends on them.
            if kind == scheduling.main_kind(config) or repeat < (repeats + 1) // 2
            for number in range(len(masks))
            for provider in providers.EVAL
            if provider != "ours-dense" or kind == "noise"
        ]

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        kinds = scheduling.masks(pytestconfig)
        mask = kinds[scheduling.main_kind(pytestconfig)][0]
        generator = providers.settled_generator(mask, pytestconfig.getoption("ngf"))
        runs = providers.eval_runs(generator, providers.EVAL)
        for kind in kinds.values():
            verify(runs, kind[0])
        return runs

    def test_eval(self, benchmark, pytestconfig, runs, repeat, kind, number, provider):
        mask = scheduling.masks(pytestconfig)[kind][number]
        distinct = distinct_fraction(mask, mask.shape[1:])
        scheduling.timed(benchmark, lambda: runs[provider](mask), results.EVAL, kind, provider, distinct=distinct)


class TestTraining:
    @staticmethod
    def schedule(config):
        kind = scheduling.main_kind(config)
        return [
            (repeat, kind, number, provider)
            for repeat in range(scheduling.long_repeats(config))
            for number in range(len(scheduling.masks(config)[kind]))
            for provider in providers.TRAINING
        ]

    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, pytestconfig):
        mask = scheduling.first_mask(pytestconfig)
        generator = providers.settled_generator(mask, pytestconfig.getoption("ngf"))
        networks = providers.training_networks(generator, providers.TRAINING)
        runs = {name: providers.training_run(network) for name, network in networks.items()}
        verify(runs, mask)
        return runs

    def test_training(self, benchmark, pytestconfig, runs, repeat, kind, number, provider):
        mask = scheduling.masks(pytestconfig)[kind][number]
        distinct = distinct_fraction(mask, mask.shape[1:])
        scheduling.timed(benchmark, lambda: runs[provider](mask), results.TRAINING, kind, provider, distinct=distinct)
