"""Batches of masks on the device, and a place for them that a CUDA graph can read."""

from __future__ import annotations

import gc
import itertools
import traceback
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from spade_kernels import LabelMap, StaticLabelMap
from spade_model.benchmark.masks import bench_masks, distinct_fraction, fresh
from spade_model.config import default_data_config

_FOUND, _BUSIEST, _NOISE = 16, 2, 8
_MIRRORED: tuple[tuple[int, ...], ...] = ((), (2,), (1,), (1, 2))


@dataclass(frozen=True)
class Workload:
    """The networks, masks and settings of the measurements.

    Attributes:
        masks: by kind, the main kind first; one image each, on the CPU.
        batch: the batch size that everything is measured at; others: that whole networks are measured at, too.
        repeats, seconds: of each measurement, at most.
        failed: by provider, why it was left out.
    """

    device: torch.device
    ngf: int
    masks: dict[str, list[LabelMap]]
    batch: int
    repeats: int
    seconds: float
    failed: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def may_fail(self, provider: str, case: str, runs: MutableMapping[str, Any]) -> Iterator[None]:
        """An exception within it takes the provider out of `runs`, and goes to `failed`; the others are measured."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            runs.pop(provider, None)
            reason = f"{case}: {type(error).__name__}: {str(error)[:200]}"
            self.failed[provider] = "; ".join(filter(None, (self.failed.get(provider), reason)))
        else:
            return
        # Not above, where the exception still holds what it went through.
        release(self.device)

    @property
    def main_masks(self) -> str:
        """ "real" or "toy"."""
        return next(iter(self.masks))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the masks."""
        return self.masks[self.main_masks][0].shape[1:]

    def case(self, precision: str, batch: int | None = None, what: str = "") -> str:
        """The case of a result: kind of masks (or `what`), precision, batch size."""
        return f"{what or self.main_masks}, {precision}, batch {batch or self.batch}"

    def batches(self, batch: int | None = None, kind: str = "") -> list[LabelMap]:
        """A few batches on the device, without window indexes."""
        batch = batch or self.batch
        count = max(1, min(3, 24 // batch))
        return [mask.to(self.device) for mask in batches(self.masks[kind or self.main_masks], batch, count)]


def read_masks(dataroot: str, size: int) -> dict[str, list[LabelMap]]:
    """By kind, masks of one image each: "real" or "toy", the "busiest" of them, uniform "noise"."""
    data = default_data_config("coco" if dataroot else "toy")
    kinds = bench_masks(replace(data, dataroot=dataroot, crop_size=size), _FOUND, every_kind=False)
    found = next(iter(kinds.values()))
    by_fraction = sorted(found, key=lambda mask: distinct_fraction(mask, mask.shape[1:]))
    random = torch.Generator().manual_seed(0)
    first = found[0]
    kinds["busiest"] = by_fraction[-_BUSIEST:]
    kinds["noise"] = [
        LabelMap(
            torch.randint(first.num_labels, first.shape, generator=random),
            first.num_labels,
            None if first.edges is None else torch.rand(first.shape, generator=random) < 0.5,
        )
        for _ in range(_NOISE)
    ]
    return kinds


def save_masks(kinds: dict[str, list[LabelMap]], path: Path) -> None:
    """For the processes that measure, so that each need not find them again."""
    plain = {kind: [(m.labels, m.num_labels, m.edges) for m in masks] for kind, masks in kinds.items()}
    torch.save(plain, path)


def load_masks(path: Path) -> dict[str, list[LabelMap]]:
    """Loads the masks that `save_masks` saved."""
    plain = torch.load(path, weights_only=True)
    return {kind: [LabelMap(*parts) for parts in masks] for kind, masks in plain.items()}


def batches(masks: Sequence[LabelMap], size: int, count: int) -> list[LabelMap]:
    """`count` batches of `size` images, no two alike before every mask and its mirror images have been taken."""
    every = itertools.cycle(_mirrored(mask, dims) for dims in _MIRRORED for mask in masks)
    return [LabelMap.cat(list(itertools.islice(every, size))) for _ in range(count)]


def place_for(found: Sequence[LabelMap], prepare: Callable[[LabelMap], LabelMap]) -> tuple[StaticLabelMap, list]:
    """A place that has room for the most of the label maps, and those it has room for."""
    best: tuple[StaticLabelMap, list] | None = None
    for example in found:
        place = StaticLabelMap(prepare(fresh(example)))
        fitting = [mask for mask in found if _fits(place, mask)]
        if best is None or len(fitting) > len(best[1]):
            best = place, fitting
        if len(fitting) == len(found):
            break
    assert best is not None
    return best


def release(device: torch.device) -> None:
    """Gives back the memory of what is no longer referred to."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fits(place: StaticLabelMap, mask: LabelMap) -> bool:
    try:
        place.copy_(fresh(mask))
    except ValueError:
        return False
    return True


def _mirrored(mask: LabelMap, dims: tuple[int, ...]) -> LabelMap:
    return LabelMap(mask.labels.flip(dims), mask.num_labels, None if mask.edges is None else mask.edges.flip(dims))
