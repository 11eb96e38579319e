"""Pictures of tensors: exact colours where they are defined, and no crash on what a broken run produces."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from spade_kernels import LabelMap
from spade_model.visualize import colour_labels, condition_image, label_colours, overlay, preview, to_image


@pytest.mark.parametrize("num_labels", [1, 2, 7, 13, 34, 36, 151, 183, 256, 512])
def test_colours_are_distinct(num_labels):
    colours = label_colours(num_labels)
    assert colours.shape == (num_labels, 3)
    assert colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == num_labels


def test_colours_of_a_data_set_are_far_apart():
    colours = label_colours(183).astype(int)
    distance = np.abs(colours[:, None] - colours[None]).sum(-1) + 1000 * np.eye(183, dtype=int)
    assert distance.min() >= 30


def test_colours_of_a_prefix_do_not_change():
    assert (label_colours(183)[:151] == label_colours(151)).all()


def test_more_labels_than_colours_repeat():
    assert label_colours(10_000).shape == (10_000, 3)


def test_colours_cannot_be_changed_by_a_caller():
    with pytest.raises(ValueError, match="read-only"):
        label_colours(13)[0] = 0


def test_cityscapes_and_toy_colours():
    cityscapes, toy = label_colours(35), label_colours(7)
    assert cityscapes[7].tolist() == [128, 64, 128]
    assert cityscapes[26].tolist() == [0, 0, 142]
    sky, trees = toy[0].astype(int), toy[4].astype(int)
    assert sky.argmax() == 2
    assert trees.argmax() == 1


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_colour_labels(dtype):
    labels = torch.tensor([[0, 1], [6, 6]], dtype=dtype)
    expected = label_colours(7)[labels.long().numpy()]
    for form in (labels, labels.numpy()):
        assert (np.asarray(colour_labels(form, 7)) == expected).all()


def test_labels_outside_the_classes_are_black():
    pixels = np.asarray(colour_labels(np.array([[-1, 0, 7, 255]]), 7))
    assert pixels.any(-1).tolist() == [[False, True, False, False]]


@pytest.mark.parametrize("shape", [(1, 2, 2), (4,)])
def test_labels_of_wrong_rank(shape):
    with pytest.raises(ValueError, match=r"\(H, W\), got"):
        colour_labels(np.zeros(shape, dtype=int), 7)


def test_every_byte_survives_the_way_to_a_tensor_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    assert (np.asarray(to_image(tensor)) == pixels).all()


@pytest.mark.parametrize(("bits", "mode"), [(8, "L"), (16, "I;16")])
def test_every_grey_level_survives_the_way_to_a_tensor_and_back(bits, mode):
    levels = np.arange(2**bits).reshape(16, -1)
    tensor = torch.from_numpy(levels).float()[None] / ((2**bits - 1) / 2) - 1
    image = to_image(tensor, bits)
    assert image.mode == mode
    assert (np.asarray(image) == levels).all()
    assert (np.asarray(preview(to_image(tensor, 16))) == np.asarray(to_image(tensor))).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_to_image_clamps_in_any_precision(dtype):
    values = torch.tensor([-float("inf"), -3.0, -1.0, 1.0, 3.0, float("inf")], dtype=dtype, requires_grad=True)
    image = to_image(values.expand(3, 1, -1))
    assert image.mode == "RGB"
    assert np.asarray(image)[0, :, 0].tolist() == [0, 0, 0, 255, 255, 255]


def test_nan_is_seen():
    tensor = torch.zeros(3, 1, 2)
    tensor[1, 0, 1] = float("nan")
    assert np.asarray(to_image(tensor)).tolist() == [[[128, 128, 128], [255, 0, 255]]]
    assert np.asarray(to_image(tensor[1:2])).tolist() == [[[128, 128, 128], [255, 0, 255]]]
    assert np.asarray(to_image(tensor[1:2], 16)).tolist() == [[32768, 0]]


@pytest.mark.parametrize("shape", [(1, 3, 4, 4), (2, 4, 4), (4, 4)])
def test_to_image_of_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"\(3, H, W\), got shape"):
        to_image(torch.zeros(shape))


def test_colours_of_16_bits_are_refused():
    with pytest.raises(ValueError, match="16 bits have one channel, got three"):
        to_image(torch.zeros(3, 4, 4), 16)


def test_condition_of_a_label_map_shows_labels_and_darker_edges():
    labels = torch.tensor([[[0, 0]], [[2, 3]]])
    edges = torch.tensor([[[False, False]], [[False, True]]])
    plain = np.asarray(condition_image(LabelMap(labels, 7), 1))
    with_edges = np.asarray(condition_image(LabelMap(labels, 7, edges), 1))
    assert (plain == label_colours(7)[[[2, 3]]]).all()
    assert (with_edges[0, 0] == plain[0, 0]).all()
    assert (with_edges[0, 1] < plain[0, 1]).all()


def test_condition_with_ignored_pixels():
    segmap = LabelMap(torch.tensor([[[255, 1]]]), 7, ignore_index=255)
    assert np.asarray(condition_image(segmap, 0))[0, 0].tolist() == [0, 0, 0]


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_dense_condition(channels):
    planes = torch.rand(2, channels, 4, 5) * 2 - 1
    shown = planes[1, :3] if channels >= 3 else planes[1, :1].repeat(3, 1, 1)
    assert (np.asarray(condition_image(planes, 1)) == np.asarray(to_image(shown))).all()


def test_overlay_blends_at_the_size_of_the_image():
    image, labels = Image.new("L", (4, 2), 100), Image.new("RGB", (2, 1), (200, 0, 100))
    assert overlay(image, labels).size == (4, 2)
    assert overlay(image, labels).getpixel((3, 1)) == (150, 50, 100)
    assert overlay(image, labels, 0.0).getpixel((0, 0)) == (100, 100, 100)
    assert overlay(image, labels, 1.0).getpixel((0, 0)) == (200, 0, 100)
