"""The settings that all GPU benchmarks share: device, network width, masks, batch sizes and time limits."""

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
    """The networks' width, the masks and the settings of the measurements.

    Attributes:
        ngf: width of the networks.
        masks: dict from the kind to masks of one image each, on the CPU; the main kind is the first.
        batch: default batch size.
        repeats, seconds: largest number of rounds, and longest time, of each measurement.
        failed: dict from each provider that failed to the reason.
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
        """Within this context, an exception removes the provider from `runs` and is recorded in `failed`."""
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            runs.pop(provider, None)
            reason = f"{case}: {type(error).__name__}: {str(error)[:200]}"
            self.failed[provider] = "; ".join(filter(None, (self.failed.get(provider), reason)))
        else:
            return
        # Within the except block, the exception would still keep the tensors of its frames alive.
        release(self.device)

    @property
    def main_masks(self) -> str:
        """The first kind of masks: "real" or "toy"."""
        return next(iter(self.masks))

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the masks."""
        return self.masks[self.main_masks][0].shape[1:]

    def case(self, precision: str, batch: int | None = None, what: str = "") -> str:
        """Returns the case of a result: the main kind of masks (or `what`), the precision and the batch size."""
        return f"{what or self.main_masks}, {precision}, batch {batch or self.batch}"

    def batches(self, batch: int | None = None, kind: str = "") -> list[LabelMap]:
        """Returns one to three batches of masks on the device, without window indexes."""
        batch = batch or self.batch
        count = max(1, min(3, 24 // batch))
        return [mask.to(self.device) for mask in batches(self.masks[kind or self.main_masks], batch, count)]

    def times(
        self, runs: Mapping[str, Callable[[Any], object]], arguments: Sequence[Any], part: float = 1.0
    ) -> dict[str, list[float]]:
        """Warms the providers up and returns their times by `clock.interleave`, within `part` (0..1) of the seconds."""
        for run in runs.values():
            # Warming up also raises the clock rate of a GPU.
            run(arguments[0])
            run(arguments[-1])
        return clock.interleave(runs, arguments, self.repeats, self.device, self.seconds * part)


def place_for(found: Sequence[LabelMap], prepare: Callable[[LabelMap], LabelMap]) -> tuple[StaticLabelMap, list]:
    """Returns a static label map that can hold as many of the label maps as possible, and the list of those."""
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
    """Frees the device memory of tensors that are no longer used."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _fits(place: StaticLabelMap, mask: LabelMap) -> bool:
    try:
        place.copy_(fresh(mask))
    except ValueError:
        return False
    return True
