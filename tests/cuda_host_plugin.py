"""For pytest: the CUDA operators, compiled for the host, take the place of the CPU's."""

from __future__ import annotations

import ctypes
import os
import warnings

import torch

import spade_kernels  # noqa: F401  It registers what is replaced here.


def pytest_configure():
    warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
    torch.ops.load_library(os.environ["SPADE_CUDA_HOST"])
    # It fills the results of torch::empty with NaN, or the largest integer.
    torch.use_deterministic_algorithms(True)


def pytest_terminal_summary(terminalreporter):
    count = ctypes.CDLL(os.environ["SPADE_CUDA_HOST"]).num_launches
    count.restype = ctypes.c_int64
    terminalreporter.write_line(f"launches of CUDA kernels: {count()}")
