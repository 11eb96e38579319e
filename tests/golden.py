"""Reading the golden vectors recorded from the original implementation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from spade_kernels import LabelMap


class Golden:
    """One `.npz`: its options, tensors by name, and the condition in both forms."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self.meta = json.loads(str(arrays["meta"]))
            self.tensors = {k: torch.from_numpy(np.array(arrays[k])) for k in arrays.files if k != "meta"}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.tensors[name]

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def segmap(self, num_labels: int, form: str):
        edges = self.tensors.get("edge")
        label_map = LabelMap(self["labels"], num_labels, edges)
        return label_map if form == "label_map" else label_map.one_hot()


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest absolute difference over the largest expected magnitude."""
    difference = (got.detach().double() - expected.double()).abs().max()
    return (difference / expected.double().abs().max().clamp_min(1e-12)).item()


def assert_close(got: torch.Tensor, expected: torch.Tensor, limit: float, name: str = "") -> None:
    assert got.shape == expected.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = relative_error(got, expected)
    assert error <= limit, f"{name}: relative error {error:.2e} > {limit:.0e}"
