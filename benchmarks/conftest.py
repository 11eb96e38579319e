"""Adds the options of the suites, and writes the machine and the masks into every result file."""

from __future__ import annotations

from benchmarks import scheduling
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import settings


def pytest_addoption(parser):
    group = parser.getgroup("spade-kernels benchmarks")
    group.addoption("--dataroot", default="", help="folder of masks in the coco layout; default: toy landscapes")
    group.addoption("--masks", type=int, default=4, help="number of masks of the main kind")
    group.addoption(
        "--repeats", type=int, default=5, help="timed calls of every provider and mask; fewer in long suites"
    )
    group.addoption("--ngf", type=int, default=64, help="generator width")
    group.addoption("--crop-size", type=int, default=256, help="width and height of masks and images, in pixels")


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["spade"] = {
        "environment": environment(),
        "settings": settings(config.getoption("ngf"), scheduling.masks(config)),
    }
