"""A workload says what to measure on a device and how long; its masks get a place that a CUDA graph can read."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from spade_kernels import LabelMap, StaticLabelMap
from spade_model.benchmark import clock
from spade_model.benchmark.masks import batches, fresh


@dataclass(frozen=True)
class Workload:
    """Holds the networks' width, the masks and the settings of the measurements.

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
        """Returns the case of a result: kind of masks (or `what`), precision, batch size."""
        return f"{what or self.main_masks}, {precision}, batch {batch or self.batch}"

    def batches(self, batch: int | None = None, kind: str = "") -> list[LabelMap]:
        """Returns a few batches on the device, without window indexes."""
        batch = batch or self.batch
        count = max(1, min(3, 24 // batch))
        return [mask.to(self.device) for mask in batches(self.masks[kind or self.main_masks], batch, count)]

    def times(
        self, runs: Mapping[str, Callable[[Any], object]], arguments: Sequence[Any], part: float = 1.0
    ) -> dict[str, list[float]]:
        """Warms the providers up and returns `clock.interleave`'s times, in at most a `part` of the seconds."""
        for run in runs.values():
            # Brings the clocks up, too.
            run(arguments[0])
            run(arguments[-1])
        return clock.interleave(runs, arguments, self.repeats, self.device, self.seconds * part)


def place_for(found: Sequence[LabelMap], prepare: Callable[[LabelMap], LabelMap]) -> tuple[StaticLabelMap, list]:
    """Returns a place that has room for the most of the label maps, and those it has room for."""
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
