"""Options that do not fit the data set: one message with the option, the value and the fix."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_data_check import ids, make_coco, rgb, save

from spade_model.config import DataConfig
from spade_model.data import create_dataset, create_loader
from spade_model.errors import UserError


class TestBadOptions:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({"dataset_mode": "custom"}, ["--label_dir"]),
            ({"dataset_mode": "custom", "label_dir": "x"}, ["--image_dir"]),
            ({"dataset_mode": "custom", "label_dir": "x", "image_dir": "y"}, ["--instance_dir", "--no_instance"]),
            ({"dataset_mode": "ade20k"}, ["ade20k", "--no_instance"]),
            ({"label_nc": 0}, ["--label_nc 0", "custom", "coco"]),
            ({"image_bits": 16}, ["--image_bits 16 with --output_nc 3", "--output_nc 1"]),
            ({"crop_size": 0}, ["--crop_size 0"]),
            ({"batch_size": -1}, ["--batch_size -1"]),
            ({"max_dataset_size": 0}, ["--max_dataset_size 0"]),
            ({"aspect_ratio": 0.0}, ["--aspect_ratio 0.0"]),
            ({"aspect_ratio": float("nan")}, ["--aspect_ratio nan"]),
            ({"seed": -1}, ["--seed -1"]),
        ],
    )
    def test_message(self, options, words):
        with pytest.raises(UserError) as caught:
            create_dataset(replace(DataConfig(), **options), "train")
        for word in words:
            assert word in str(caught.value)

    def test_split(self, tmp_path):
        with pytest.raises(UserError, match=r"'test'.*train, val"):
            create_dataset(make_coco(tmp_path), "test")

    def test_batch_larger_than_the_data_set(self, tmp_path):
        config = replace(make_coco(tmp_path), batch_size=3)
        with pytest.raises(UserError, match=r"2 images, fewer than one batch.*--batch_size"):
            create_loader(create_dataset(config, "train"), config, shuffle=True, epoch=0)

    def test_resume_beyond_the_epoch(self, tmp_path):
        config = make_coco(tmp_path)
        with pytest.raises(UserError, match="image 9 of an epoch of 2"):
            create_loader(create_dataset(config, "train"), config, shuffle=True, epoch=0, first_image=9)

    @pytest.mark.parametrize("num_workers", [0, 1])
    def test_sizes_that_differ_within_a_batch(self, tmp_path, num_workers):
        config = replace(make_coco(tmp_path), preprocess_mode="none", num_workers=num_workers)
        for folder, pixels in (("train_label/1.png", ids()), ("train_inst/1.png", ids()), ("train_img/1.jpg", rgb())):
            save(tmp_path / folder, np.concatenate([pixels, pixels]))
        with pytest.raises(UserError, match=r"0 is 32x32 and 1 is 32x64.*--batch_size 1.*resize_and_crop") as caught:
            list(create_loader(create_dataset(config, "train"), config, shuffle=False, epoch=0))
        assert "Traceback" not in str(caught.value)

    @pytest.mark.parametrize(
        ("mode", "fix"),
        [
            ("crop", "lower --crop_size"),
            ("resize_and_crop", "--load_size to at least 64"),
            ("scale_width_and_crop", "--load_size to at least 64"),
            ("scale_shortside_and_crop", "--load_size to at least 64"),
        ],
    )
    def test_image_smaller_than_the_crop(self, tmp_path, mode, fix):
        config = replace(make_coco(tmp_path), preprocess_mode=mode, crop_size=64)
        with pytest.raises(UserError, match=rf"0\.png: the image is 40x40.*crop of 64x64.*{fix}"):
            create_dataset(config, "train")[0]

    def test_elongated_image(self, tmp_path):
        config = replace(make_coco(tmp_path), preprocess_mode="scale_shortside", load_size=2000)
        save(tmp_path / "train_label/0.png", np.full((1, 40), 5, dtype=np.uint8))
        with pytest.raises(UserError, match=r"0\.png: the image is 40x1 .* 80000x2000: too large"):
            create_dataset(config, "train")[0]
