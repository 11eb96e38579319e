"""A sample of a data set, a batch, and the function that builds a batch from samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from spade_kernels.label_map import LabelMap
from spade_model.errors import UserError


@dataclass(frozen=True)
class Sample:
    """A preprocessed item of a data set."""

    condition: torch.Tensor
    """int64 (H, W) classes; or, when label_nc is 0, a float32 (3, H, W) RGB image in [-1, 1]."""
    edges: torch.Tensor | None
    """bool (H, W), the instance boundaries; None with no_instance."""
    image: torch.Tensor | None
    """float32 (output_nc, H, W) photograph in [-1, 1]; None when there is none."""
    name: str
    """The label file's name without its suffix, or the name that a data set without files gives the item."""


@dataclass(frozen=True)
class Batch:
    """Several items of the same size."""

    segmap: LabelMap | torch.Tensor
    """The condition: a label map; or, when label_nc is 0, float32 (N, semantic_nc, H, W) with RGB in [-1, 1], followed
    by the plane of instance edges (0 or 1) when instances are used."""
    image: torch.Tensor | None
    """float32 (N, output_nc, H, W) in [-1, 1]; None when the data set has no photographs."""
    names: list[str]
    """The samples' names."""

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Moves the batch to another device."""
        image = None if self.image is None else self.image.to(device, non_blocking=non_blocking)
        return Batch(self.segmap.to(device, non_blocking=non_blocking), image, self.names)

    def pin_memory(self) -> Batch:
        """Returns a copy in pinned (page-locked) memory."""
        return Batch(self.segmap.pin_memory(), None if self.image is None else self.image.pin_memory(), self.names)


def collate(samples: Sequence[Sample], num_labels: int) -> Batch:
    """Builds a batch from samples. With `num_labels` 0 the samples' conditions are RGB images.

    Raises UserError when the samples' sizes differ.
    """
    _require_one_size(samples)
    condition = torch.stack([sample.condition for sample in samples])
    edges = _stack([sample.edges for sample in samples])
    image = _stack([sample.image for sample in samples])
    names = [sample.name for sample in samples]
    if num_labels:
        return Batch(LabelMap(condition, num_labels, edges), image, names)
    if edges is not None:
        condition = torch.cat((condition, edges.unsqueeze(1).to(condition.dtype)), dim=1)
    return Batch(condition, image, names)


def _stack(tensors: list[torch.Tensor | None]) -> torch.Tensor | None:
    present = [tensor for tensor in tensors if tensor is not None]
    return torch.stack(present) if present else None


def _require_one_size(samples: Sequence[Sample]) -> None:
    first = samples[0]
    for sample in samples:
        if sample.condition.shape != first.condition.shape:
            sizes = [f"{s.name} is {s.condition.shape[-1]}x{s.condition.shape[-2]}" for s in (first, sample)]
            raise UserError(
                f"images of different sizes cannot form a batch: {' and '.join(sizes)} after preprocessing. "
                "Use --batch_size 1, or a --preprocess_mode that gives all images one size (resize_and_crop, fixed)."
            )
