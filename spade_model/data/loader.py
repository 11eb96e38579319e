"""Loads batches in an order that depends only on seed and epoch: neither workers, ranks nor resuming change it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import cast

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from spade_kernels import LabelMap
from spade_model.config import DataConfig
from spade_model.data.dataset import SpadeDataset
from spade_model.data.sample import Batch, Sample, collate
from spade_model.data.seeding import EPOCH_ORDER, random_stream
from spade_model.errors import UserError
from spade_model.registry import DATASETS, DatasetSpec
from spade_model.stopping import STOP_SIGNALS


class Loader:
    """The batches of one epoch, from `first_image` on. `len()` is their number."""

    def __init__(self, loader: DataLoader, num_batches: int) -> None:
        self._loader = loader
        self._num_batches = num_batches

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[Batch]:
        """Yields batches. Raises UserError when the files of the next batch cannot be used."""
        for batch in self._loader:
            if isinstance(batch, UserError):
                raise batch
            yield batch


def create_loader(
    dataset: SpadeDataset,
    config: DataConfig,
    *,
    shuffle: bool,
    epoch: int,
    first_image: int = 0,
    rank: int = 0,
    world_size: int = 1,
    drop_last: bool = True,
    pin_memory: bool = False,
    prepare: Callable[[LabelMap], object] | None = None,
) -> Loader:
    """Creates the loader of one process for one epoch.

    Together, the batches of all ranks at step k are the batch that a single process with world_size times the batch
    size would get at step k; rank r gets the r-th part. Without drop_last, the last batch can be smaller, and the last
    ranks can get one batch fewer.

    Args:
        shuffle: take items in the random order of (config.seed, epoch), unless config.serial_batches.
        first_image: number of images, over all ranks, that the epoch has had when a run is resumed. The other images
            are shared out from there, also if the batch size or the number of processes was another before.
        prepare: function that is called with the label map of each batch, in the process that loads the batch, to build
            indexes ahead of the training step. It must be picklable for spawned workers.

    Raises:
        UserError: there are fewer items than one batch with drop_last, or first_image is beyond the end of the epoch.
    """
    if first_image > len(dataset):
        raise UserError(
            f"cannot resume after image {first_image} of an epoch of {len(dataset)} images: the data set or "
            "--max_dataset_size changed since the state was saved. Restore it or start anew."
        )
    batches = batch_keys(
        len(dataset),
        config,
        shuffle=shuffle and not config.serial_batches,
        epoch=epoch,
        first_image=first_image,
        rank=rank,
        world_size=world_size,
        drop_last=drop_last,
    )
    loader: DataLoader = DataLoader(
        cast(Dataset, _ReportingDataset(dataset)),
        batch_sampler=batches,
        collate_fn=partial(_collate_or_report, num_labels=config.num_labels, prepare=prepare),
        num_workers=config.num_workers,
        worker_init_fn=partial(_start_worker, datasets=DATASETS),
        pin_memory=pin_memory,
        # With its own generator, DataLoader does not draw its workers' seeds from the global one.
        generator=torch.Generator(),
    )
    return Loader(loader, len(batches))


def batch_keys(
    num_items: int,
    config: DataConfig,
    *,
    shuffle: bool,
    epoch: int,
    first_image: int,
    rank: int,
    world_size: int,
    drop_last: bool,
) -> list[list[tuple[int, int]]]:
    """Returns the (epoch, index) pairs of every batch of one rank, from `first_image` of the epoch on."""
    global_batch = config.batch_size * world_size
    order = np.arange(num_items)
    if shuffle:
        order = random_stream(config.seed, EPOCH_ORDER, epoch).permutation(num_items)
    order = order[first_image:]
    if drop_last:
        count_batches(num_items, config, world_size)
        order = order[: len(order) // global_batch * global_batch]
    batches = []
    for start in range(rank * config.batch_size, len(order), global_batch):
        batches.append([(epoch, int(index)) for index in order[start : start + config.batch_size]])
    return batches


def count_batches(num_items: int, config: DataConfig, world_size: int) -> int:
    """The number of full batches that each process has in an epoch. Raises UserError when there is none."""
    global_batch = config.batch_size * world_size
    if num_items < global_batch:
        raise UserError(
            f"the data set has {num_items} images, fewer than one batch ({config.batch_size} images on each of "
            f"{world_size} processes). Lower --batch_size or add images."
        )
    return num_items // global_batch


class _ReportingDataset:
    """Returns an item's UserError instead of raising it: a worker's exception would reach the user as a traceback."""

    def __init__(self, dataset: SpadeDataset) -> None:
        self._dataset = dataset

    def __getitem__(self, key: tuple[int, int]) -> Sample | UserError:
        try:
            return self._dataset[key]
        except UserError as error:
            return error


def _collate_or_report(
    samples: Sequence[Sample | UserError], num_labels: int, prepare: Callable[[LabelMap], object] | None
) -> Batch | UserError:
    good = []
    for sample in samples:
        if isinstance(sample, UserError):
            return sample
        good.append(sample)
    try:
        batch = collate(good, num_labels)
    except UserError as error:
        return error
    if prepare is not None and isinstance(batch.segmap, LabelMap):
        prepare(batch.segmap)
    return batch


def _start_worker(worker: int, datasets: dict[str, DatasetSpec]) -> None:
    # A worker that is spawned has imported the data sets of this package only.
    DATASETS.update(datasets)
    torch.set_num_threads(1)
    # A stop signal can reach the whole process group. Workers ignore it, because the training process ends them.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
