"""The toy data set: procedural landscapes, which need no files."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from spade_kernels.label_map import instance_edges
from spade_model.config import DataConfig
from spade_model.data.dataset import SpadeDataset
from spade_model.data.images import to_photograph
from spade_model.data.item import photograph_to_tensor
from spade_model.data.sample import Sample
from spade_model.data.toy.classes import TOY_CLASSES
from spade_model.data.toy.scene import SMALLEST_SIDE, draw_toy
from spade_model.errors import UserError
from spade_model.registry import DatasetSpec

TOY_LENGTHS = {"train": 2**16, "val": 512}
"""Images of the toy data set, unless max_dataset_size is less."""


class ToyDataset(SpadeDataset):
    """Landscapes drawn on demand, at the size the generator makes; the preprocess mode does not apply."""

    def __len__(self) -> int:
        return min(self.config.max_dataset_size, TOY_LENGTHS[self.split])

    def sample(self, index: int, random: np.random.Generator | None) -> Sample:
        height, width = self.config.image_size
        toy = draw_toy(self.config.seed, self.split, index, height, width)
        flip = random is not None and not self.config.no_flip and bool(random.random() < 0.5)
        step = -1 if flip else 1
        labels, instances, rgb = (plane[:, ::step].copy() for plane in (toy.labels, toy.instances, toy.image))
        image = None
        if self.need_images:
            photograph = to_photograph(Image.fromarray(rgb), self.config.output_nc, self.config.image_bits)
            image = photograph_to_tensor(photograph)
        return Sample(
            torch.from_numpy(labels.astype(np.int64)),
            None if self.config.no_instance else instance_edges(torch.from_numpy(instances)),
            image,
            f"toy_{index:06d}",
        )


def _check(config: DataConfig) -> None:
    if config.label_nc < len(TOY_CLASSES):
        raise UserError(f"--label_nc {config.label_nc} is too small; the toy data set has {len(TOY_CLASSES)} classes")
    if min(config.image_size) < SMALLEST_SIDE:
        height, width = config.image_size
        raise UserError(f"toy images of {width}x{height} are too small; their sides must be at least {SMALLEST_SIDE}")


TOY = DatasetSpec(
    DataConfig(
        label_nc=len(TOY_CLASSES),
        contain_dontcare_label=False,
        preprocess_mode="none",
        load_size=64,
        crop_size=64,
        batch_size=8,
        max_dataset_size=2048,
    ),
    create=ToyDataset,
    class_names=TOY_CLASSES,
    check=_check,
    folder_options=(),
)
