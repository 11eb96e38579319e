"""Random label maps through the compiled kernels: every window index naive, every layer output the stock layer's.

A seed is a case, always the same one; `make fuzz` runs 10,000. Any 1600 seeds in a row have every mask size up to
40 x 40.
"""

from __future__ import annotations

import functools
import os
import random
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from test_window_index import padded_windows

from spade_kernels import SPADE, LabelMap
from spade_kernels.testing import MASK_KINDS, random_labels, random_spade, relative_error, stock_spade
from spade_kernels.windows import Windows

CASES = int(os.environ.get("SPADE_FUZZ", "300"))
KINDS = (*MASK_KINDS, "last class", "all ignored")
CHANNELS = 3
IGNORED = 1000


@dataclass(frozen=True)
class Case:
    """A layer over a label map of this shape. size: of y, `upsample` times that of x."""

    seed: int
    kind: str
    shape: tuple[int, int, int]
    size: tuple[int, int]
    upsample: int
    num_labels: int
    edges: bool
    ignore: bool
    kernel_size: int

    @classmethod
    def draw(cls, seed: int) -> Case:
        draw = random.Random(seed)
        kind = KINDS[seed % len(KINDS)]
        height, width = 1 + seed % 40, 1 + (7 * seed + seed // 40) % 40
        upsample = draw.choice((1, 1, 2))
        size = draw.choice([(height, width), (draw.randint(1, 48), draw.randint(1, 48))])
        return cls(
            seed=seed,
            kind=kind,
            shape=(draw.randint(1, 3), height, width),
            size=(-(-size[0] // upsample) * upsample, -(-size[1] // upsample) * upsample),
            upsample=upsample,
            # Few with more than 40: their one-hot planes keep the stock layer busy.
            num_labels=draw.choice((1, 2, 3, 5, 8, 20, 40, draw.randint(1, 300))),
            edges=draw.random() < 0.5,
            ignore=kind == "all ignored" or draw.random() < 0.5,
            kernel_size=draw.choice((1, 3, 5)),
        )

    def label_map(self) -> LabelMap:
        generator = torch.Generator().manual_seed(self.seed)
        if self.kind == "all ignored":
            labels = torch.full(self.shape, IGNORED)
        elif self.kind == "last class":
            labels = torch.full(self.shape, self.num_labels - 1)
        else:
            labels = random_labels(self.kind, self.shape, self.num_labels, self.seed)
            if self.ignore:
                labels[torch.rand(self.shape, generator=generator) < 0.1] = IGNORED
        edges = torch.rand(self.shape, generator=generator) < 0.2 if self.edges else None
        return LabelMap(labels, self.num_labels, edges, IGNORED if self.ignore else None)


def check_windows(seen: Windows, ids: torch.Tensor, size: tuple[int, int], kernel_size: int) -> None:
    expected = padded_windows(ids, size, kernel_size, 1, kernel_size // 2)
    rows = len(seen)
    assert seen.pixel_row.shape == (len(ids), *size)
    assert 0 <= seen.pixel_row.min() <= seen.pixel_row.max() < rows
    assert torch.equal(seen.windows[seen.pixel_row], expected)
    # Image after image, and in each by first occurrence: every pixel's row is known already or the next new one.
    flat = seen.pixel_row.flatten()
    known = F.pad(flat.cummax(0).values, (1, 0), value=-1)[:-1]
    assert (flat <= known + 1).all()
    offsets = seen.image_offsets.tolist()
    assert (offsets[0], offsets[-1]) == (0, rows)
    for image, first, end in zip(seen.pixel_row, offsets[:-1], offsets[1:], strict=True):
        assert (image.min(), image.max()) == (first, end - 1)
        assert len(seen.windows[first:end].unique(dim=0)) == end - first


@functools.cache
def layer_for(kernel_size: int, channels: int) -> SPADE:
    # By running statistics: one pixel has no variance.
    return random_spade(f"spadebatch{kernel_size}x{kernel_size}", CHANNELS, channels).double().eval()


@pytest.mark.parametrize("backend", ["cpu"], indirect=True)
@pytest.mark.parametrize("seed", range(CASES))
@torch.no_grad()
def test_case(backend, seed):
    case = Case.draw(seed)
    label_map = case.label_map()
    index = label_map.window_index(case.size, case.kernel_size)
    check_windows(index.hidden, label_map.codes, case.size, case.kernel_size)
    hidden_ids = index.hidden.pixel_row + 1
    check_windows(index.modulation, hidden_ids, case.size, case.kernel_size)

    layer = layer_for(case.kernel_size, label_map.channels)
    x = torch.randn(case.shape[0], CHANNELS, *(s // case.upsample for s in case.size), dtype=torch.float64)
    upsampled = F.interpolate(x, scale_factor=case.upsample)
    expected = stock_spade(layer, upsampled, label_map.one_hot(torch.float64), 0.2)
    assert relative_error(layer(x, label_map, 0.2, upsample=case.upsample), expected) < 1e-11
