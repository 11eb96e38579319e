"""The toy landscapes: reproducible, varied, and with colours that tell the classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from spade_model.config import default_data_config
from spade_model.data import TOY_CLASSES, create_dataset, create_loader
from spade_model.data.toy import draw_toy
from spade_model.errors import UserError


def pixels(split: str, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """RGB (pixels, 3) and labels (pixels,) of the first images of a split."""
    images = [draw_toy(0, split, index, size, size) for index in range(count)]
    colours = np.concatenate([image.image.reshape(-1, 3) for image in images]).astype(np.float64)
    return colours, np.concatenate([image.labels.ravel() for image in images])


@pytest.mark.parametrize("size", [64, 128])
def test_colours_tell_the_classes(size):
    colours, labels = pixels("train", 64, size)
    shares = np.bincount(labels, minlength=len(TOY_CLASSES)) / labels.size
    assert (shares >= 0.015).all(), dict(zip(TOY_CLASSES, shares, strict=True))
    seen, truth = pixels("val", 16, size)
    scores = []
    for label in range(len(TOY_CLASSES)):
        members = colours[labels == label]
        covariance = np.cov(members.T)
        offsets = seen - members.mean(0)
        distance = ((offsets @ np.linalg.inv(covariance)) * offsets).sum(1)
        scores.append(-0.5 * distance - 0.5 * np.linalg.slogdet(covariance)[1])
    assert (np.argmax(scores, axis=0) == truth).mean() >= 0.97


def test_same_arguments_same_pixels():
    first, second = (draw_toy(3, "train", 11, 64, 64) for _ in range(2))
    for name in ("labels", "instances", "image"):
        assert np.array_equal(getattr(first, name), getattr(second, name))


def test_seeds_splits_and_indexes_differ():
    images = [draw_toy(*arguments, 32, 32).image.tobytes() for arguments in ((0, "train", 0), (1, "train", 0))]
    images += [draw_toy(*arguments, 32, 32).image.tobytes() for arguments in ((0, "val", 0), (0, "train", 1))]
    assert len(set(images)) == 4


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 71), (128, 64), (32, 320), (96, 40)])
def test_any_size(height, width):
    for index in range(20):
        toy = draw_toy(0, "train", index, height, width)
        assert toy.labels.shape == toy.instances.shape == (height, width)
        assert toy.image.shape == (height, width, 3)
        assert toy.labels.max() < len(TOY_CLASSES)
        assert toy.instances.min() > 0


def test_instances_lie_within_classes_and_part_them():
    counts = []
    for index in range(20):
        toy = draw_toy(0, "train", index, 64, 64)
        pairs = np.unique(np.stack([toy.instances.ravel(), toy.labels.ravel()]), axis=1)
        assert len(np.unique(pairs[0])) == pairs.shape[1]
        counts.append(pairs.shape[1])
    assert min(counts) >= 4
    assert np.mean(counts) > 10


def test_dataset():
    config = default_data_config("toy")
    dataset = create_dataset(config, "train")
    assert len(dataset) == 2048
    batch = next(iter(create_loader(dataset, config, shuffle=True, epoch=0)))
    assert batch.segmap.one_hot().shape == (8, config.semantic_nc, 64, 64)
    assert batch.image.shape == (8, 3, 64, 64)
    assert batch.segmap.edges.any()
    assert create_dataset(config, "val", need_images=False)[0].image is None
    assert create_dataset(replace(config, no_instance=True), "val")[5].edges is None
    assert create_dataset(config, "val")[12].name == "toy_000012"


def test_flips_mirror_everything():
    dataset = create_dataset(default_data_config("toy"), "train")
    plain = create_dataset(replace(default_data_config("toy"), no_flip=True), "train")
    flipped = 0
    for epoch in range(12):
        sample, original = dataset[epoch, 4], plain[epoch, 4]
        if not torch.equal(sample.image, original.image):
            flipped += 1
            assert torch.equal(sample.image.flip(-1), original.image)
            assert torch.equal(sample.condition.flip(-1), original.condition)
            assert torch.equal(sample.edges.flip(-1), original.edges)
    assert 1 <= flipped <= 11


def test_too_small_or_too_few_classes():
    with pytest.raises(UserError, match="16x16"):
        create_dataset(replace(default_data_config("toy"), crop_size=16), "train")
    with pytest.raises(UserError, match="--label_nc 6"):
        create_dataset(replace(default_data_config("toy"), label_nc=6), "train")
