"""Data sets and generators that a module outside the package registers, used as the package's own are."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY, assert_refused
from PIL import Image
from torch import nn

import spade_model
from spade_model.config import DataConfig, ModelConfig, default_data_config
from spade_model.data import (
    DATASETS,
    DatasetSpec,
    FileGroup,
    Layout,
    Sample,
    SpadeDataset,
    check_dataset,
    create_dataset,
    create_loader,
)
from spade_model.errors import UserError
from spade_model.networks import GENERATORS, GeneratorSpec, build_generator


class Stripes(SpadeDataset):
    """Items made without files: stripes of three classes, each as bright as its number."""

    def __len__(self) -> int:
        return min(4, self.config.max_dataset_size)

    def sample(self, index: int, random: np.random.Generator | None) -> Sample:
        height, width = self.config.image_size
        labels = ((torch.arange(width) + index) % 3).expand(height, width)
        image = (labels - 1.0).expand(self.config.output_nc, height, width) if self.need_images else None
        return Sample(labels, None, image, f"stripes_{index}")


def check_stripes(config: DataConfig) -> None:
    if config.label_nc < 3:
        raise UserError(f"--label_nc {config.label_nc} is too small; stripes have 3 classes")


def survey_layout(config: DataConfig, split: str) -> Layout:
    root = Path(config.dataroot, split)
    return Layout(
        FileGroup("label image", "--dataroot", (root,), r"_ids\.png$"),
        FileGroup("photograph", "--dataroot", (root,), r"_photo\.png$"),
        pairing_key=lambda path: path.rpartition("_")[0],
    )


class Painter(nn.Module):
    """One convolution of the one-hot mask; `depth` is no option and keeps its default."""

    def __init__(self, semantic_nc: int, *, ngf: int, output_nc: int, depth: int = 2):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(semantic_nc, ngf, 1), nn.Conv2d(ngf, output_nc, 1))
        self.depth = depth

    def forward(self, segmap, z=None):
        return self.layers(segmap.one_hot()).tanh()


def check_painter(data: DataConfig, model: ModelConfig, batch: int) -> None:
    if model.norm_G != "none":
        raise UserError(f"--norm_G {model.norm_G!r} is not none; a painter has no norm")


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    small = DataConfig(label_nc=3, contain_dontcare_label=False, no_instance=True, crop_size=16, load_size=16)
    stripes = DatasetSpec(replace(small, batch_size=2), create=Stripes, check=check_stripes)
    monkeypatch.setitem(DATASETS, "stripes", stripes)
    monkeypatch.setitem(DATASETS, "survey", DatasetSpec(small, layout=survey_layout, ids_from_1=True))
    monkeypatch.setitem(GENERATORS, "painter", GeneratorSpec(Painter, ModelConfig(norm_G="none"), check_painter))


@pytest.fixture
def survey(tmp_path) -> DataConfig:
    """Two label images with the ids 1 to 3 and their photographs."""
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        ids = np.resize(np.array([1, 2, 3], np.uint8), (16, 16))
        Image.fromarray(ids).save(tmp_path / "train" / f"{name}_ids.png")
        Image.fromarray(ids).convert("RGB").save(tmp_path / "train" / f"{name}_photo.png")
    return replace(default_data_config("survey"), dataroot=str(tmp_path), ade20k_shift=True)


OPTIONS = [
    *("--dataset_mode", "stripes", "--netG", "painter", "--ngf", "2", "--ndf", "2", "--num_D", "1"),
    *("--niter", "1", "--no_vgg_loss", "--no_html", "--device", "cpu"),
]


def test_both_from_training_to_images(spade, tmp_path):
    where = ("--name", "run", "--checkpoints_dir", tmp_path)
    assert spade("train", *OPTIONS, *where).status == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["data"]["dataset_mode"], config["model"]["netG"]) == ("stripes", "painter")
    assert (config["data"]["batch_size"], config["model"]["norm_G"]) == (2, "none")
    result = spade("train", *where, "--continue_train", "--niter", "2")
    assert (result.status, result.err) == (0, ""), result
    done = spade("generate", *where, "--results_dir", tmp_path / "results", "--device", "cpu")
    assert "4 images of 4 masks" in done.out, done
    loaded = spade_model.load_model(tmp_path / "run" / "latest.safetensors", device="cpu")
    assert (type(loaded.generator), loaded.generator.depth) == (Painter, 2)
    label = tmp_path / "label.png"
    Image.fromarray(np.zeros((40, 30), np.uint8)).save(label)
    assert spade_model.generate(tmp_path / "run" / "latest.safetensors", label)[0].size == (12, 16)


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--label_nc", "2"], ["--label_nc 2", "stripes have 3 classes"]),
        (["--norm_G", "batch"], ["--norm_G 'batch'", "a painter has no norm"]),
        (["--label_nc", "0"], ["--label_nc 0", "custom and facades", "not stripes"]),
    ],
)
def test_their_own_checks(spade, tmp_path, options, fragments):
    assert_refused(spade("train", *OPTIONS, "--checkpoints_dir", tmp_path / "runs", *options), *fragments)
    assert not (tmp_path / "runs").exists()


def test_the_command_line_lists_them(spade):
    listed = spade("train", "--help").message
    assert "{coco,ade20k,cityscapes,facades,custom,toy,stripes,survey}" in listed
    assert "{spade,pix2pixhd,painter}" in listed
    assert "(default: coco)" in listed


def test_files_of_a_layout(spade, survey):
    assert check_dataset(survey, "train") == []
    assert create_dataset(survey, "train")[0].condition.unique().tolist() == [0, 1, 2]
    (Path(survey.dataroot) / "train" / "b_photo.png").unlink()
    options = ("--dataset_mode", "survey", "--ade20k_shift", "--dataroot", survey.dataroot, "--split", "train")
    assert_refused(spade("doctor", *options), "b_ids.png", "has no photograph")


def test_workers_that_are_spawned_know_them(survey):
    method = multiprocessing.get_start_method()
    multiprocessing.set_start_method("spawn", force=True)
    try:
        config = replace(survey, num_workers=1)
        batches = list(create_loader(create_dataset(config, "train"), config, shuffle=False, epoch=0))
    finally:
        multiprocessing.set_start_method(method, force=True)
    assert [batch.names for batch in batches] == [["a_ids"], ["b_ids"]]


def test_unknown_names_are_answered_with_the_known_ones(spade):
    known = "spade, pix2pixhd, painter"
    assert_refused(spade("train", *TINY, "--netG", "voc"), f"--netG 'voc' is not one of {known}")
    with pytest.raises(UserError, match=known):
        build_generator(DataConfig(), ModelConfig(netG="voc"))
    with pytest.raises(UserError, match=r"'voc' is not one of coco, .*, stripes, survey"):
        create_dataset(DataConfig(dataset_mode="voc"), "train")
    assert "stripes, survey" in str(check_dataset(DataConfig(dataset_mode="voc"), "train")[0])


def test_a_data_set_has_files_or_makes_items():
    for choice in ({}, {"layout": survey_layout, "create": Stripes}):
        with pytest.raises(ValueError, match="layout or a create"):
            DatasetSpec(DataConfig(), **choice)


def test_the_config_module_does_not_load_torch():
    program = "import sys, spade_model.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=Path(__file__).parents[1]).returncode == 0
