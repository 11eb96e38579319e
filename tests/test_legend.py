"""Names and colours of classes: where they come from, and the pages that show them."""

from __future__ import annotations

import html
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_train import small_config

import spade_model
from spade_model.config import DataConfig
from spade_model.data import TOY_CLASSES
from spade_model.errors import UserError
from spade_model.legend import find_legend
from spade_model.visualize import label_colours

CONFIG = DataConfig(dataset_mode="custom", label_nc=3, contain_dontcare_label=True, no_instance=True)


def write(path: Path, text: str, encoding: str = "utf-8") -> DataConfig:
    path.write_text(text, encoding=encoding)
    return replace(CONFIG, classes=str(path))


def save_palette(path: Path, colours: list[tuple[int, int, int]], size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    mask = Image.fromarray((np.arange(size[0] * size[1]) % 3).astype(np.uint8).reshape(size[::-1]))
    mask.putpalette([level for colour in colours for level in colour])
    mask.save(path)
    return path


def test_without_anything_classes_are_called_by_their_ids():
    legend = find_legend(CONFIG)
    assert legend.names == ("0", "1", "2", "unknown")
    assert (legend.colours == label_colours(4)).all()
    assert find_legend(replace(CONFIG, dataset_mode="ade20k", ade20k_shift=True)).names == ("1", "2", "3", "unknown")
    assert find_legend(replace(CONFIG, label_nc=0)).entries() == []
    assert find_legend(DataConfig(dataset_mode="toy", label_nc=7, contain_dontcare_label=False)).names == TOY_CLASSES


@pytest.mark.parametrize(
    "text",
    [
        "id,name,colour\n0,sky,#102030\n2,caf\u00e9\n255,rest,red\n",
        "0;sky;#102030\r\n\r\n2;caf\u00e9\r\n255;rest;rgb(255,0,0)",
        "\ufeff0, sky, #102030\n2, caf\u00e9,\n255, rest, #f00",
    ],
)
def test_class_files(tmp_path, text):
    legend = find_legend(write(tmp_path / "names.csv", text))
    assert legend.names == ("sky", "1", "caf\u00e9", "rest")
    assert legend.entries()[0] == ("sky", "#102030")
    assert legend.entries()[3] == ("rest", "#ff0000")
    assert (legend.colours[1:3] == label_colours(4)[1:3]).all()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,sky\n7,sea", r"line 2: id 7 is not a class; the classes are the ids 0\.\.2, and 255 for unknown"),
        ("0,sky\n0,sea", "line 2: id 0 has a name already"),
        ("0,sky,mauvish", "line 1: 'mauvish' is no colour; write it as #rrggbb"),
        ("0", "line 1: '0' is not id,name"),
        ("sky,0", "line 1: 'sky,0' is not id,name"),
    ],
)
def test_bad_class_files(tmp_path, text, words):
    with pytest.raises(UserError, match=rf"names\.csv, {words}"):
        find_legend(write(tmp_path / "names.csv", text))


def test_class_files_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"no\.csv cannot be read: No such file"):
        find_legend(replace(CONFIG, classes=str(tmp_path / "no.csv")))
    with pytest.raises(UserError, match=r"names\.csv is not a text file in UTF-8"):
        find_legend(write(tmp_path / "names.csv", "0,caf\u00e9", "latin-1"))


def test_colours_of_a_palette(tmp_path):
    palette = [(200, 0, 0), (0, 200, 0), (200, 0, 0)]
    colours = find_legend(CONFIG, save_palette(tmp_path / "a.png", palette)).colours
    assert colours[:2].tolist() == [[200, 0, 0], [0, 200, 0]]
    assert (colours[2:] == label_colours(4)[2:]).all(), "a repeated colour is left out"
    config = write(tmp_path / "names.csv", "1,grass,#123456")
    assert find_legend(config, tmp_path / "a.png").entries()[:2] == [("0", "#c80000"), ("grass", "#123456")]


def test_ramps_of_greys_and_files_without_a_palette(tmp_path):
    ramp = save_palette(tmp_path / "a.png", [(level, level, level) for level in range(3)])
    Image.new("L", (4, 4)).save(tmp_path / "b.png")
    (tmp_path / "c.png").write_text("hello")
    for path in (ramp, tmp_path / "b.png", tmp_path / "c.png", tmp_path / "no.png"):
        assert (find_legend(CONFIG, path).colours == label_colours(4)).all()


def shown(page: Path) -> list[str]:
    """The legend of a page, as HTML."""
    return [html.unescape(line.strip()) for line in page.read_text("utf-8").splitlines() if line.startswith("<li>")]


def test_pages_show_names_and_colours_of_the_masks(tmp_path, spade):
    palette = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    for number in range(2):
        save_palette(tmp_path / f"masks/{number}.png", palette)
        (tmp_path / "photos").mkdir(exist_ok=True)
        Image.new("RGB", (32, 32)).save(tmp_path / f"photos/{number}.png")
    names = write(tmp_path / "names.csv", "0,sky\n1,<b>,#123456\n").classes
    data = {"dataset_mode": "custom", "label_dir": str(tmp_path / "masks"), "image_dir": str(tmp_path / "photos")}
    data |= {"label_nc": 3, "no_instance": True, "classes": names, "preprocess_mode": "fixed"}
    config = small_config(tmp_path, max_steps=2, no_html=False, save_epoch_freq=1, data=data)
    run = spade_model.train(replace(config, niter=2))
    legend = [
        '<li><i style="background: #c80000"></i>sky</li>',
        '<li><i style="background: #123456"></i><b></li>',
        '<li><i style="background: #0000c8"></i>2</li>',
    ]
    assert shown(run / "web/index.html") == legend
    command = ["generate", "--name", "run", "--checkpoints_dir", tmp_path, "--label", tmp_path / "masks"]
    command += ["--results_dir", tmp_path / "out"]
    done = spade(*command, "--which_epoch", "1,latest", "--overlay")
    page = tmp_path / "out/run/1_latest/index.html"
    assert done.out == f"4 images of 2 masks, and their page: {page}\n"
    assert shown(page) == legend
    with Image.open(page.parent / "images/input_label/0.png") as mask:
        assert np.asarray(mask)[0, :3].tolist() == [[200, 0, 0], [0x12, 0x34, 0x56], [0, 0, 200]]
    columns = ["epoch_1_synthesized_image", "epoch_1_overlay", "latest_synthesized_image", "latest_overlay"]
    assert sorted(path.name for path in (page.parent / "images").iterdir()) == sorted(["input_label", *columns])

    Path(names).unlink()
    moved = spade(*command)
    assert moved.status == 0
    assert "the names of the classes are not shown" in moved.out
    refused = spade(*command, "--classes", "nowhere.csv")
    assert (refused.status, "--classes nowhere.csv cannot be read" in refused.err) == (2, True)


def test_epochs_equal_those_generated_alone(trained_run, tmp_path, spade):
    (tmp_path / "run").mkdir()
    for name in ("1", "latest"):
        (tmp_path / f"run/{name}.safetensors").write_bytes((trained_run / "latest.safetensors").read_bytes())
    command = ["generate", "--name", "run", "--checkpoints_dir", tmp_path, "--how_many", 1, "--device", "cpu"]
    assert spade(*command, "--which_epoch", "1, latest", "--results_dir", tmp_path / "both").status == 0
    assert spade(*command, "--results_dir", tmp_path / "one").status == 0
    alone, *both = (
        file.read_bytes()
        for folder in ("one", "both")
        for file in sorted((tmp_path / folder).rglob("*synthesized_image/*.png"))
    )
    assert both == [alone, alone]
    missing = spade(*command, "--which_epoch", "1,7", "--results_dir", tmp_path / "none")
    assert (missing.status, "7.safetensors" in missing.err, (tmp_path / "none").exists()) == (2, True, False)


def test_doctor_names_the_ids(tmp_path, spade):
    save_palette(tmp_path / "masks/a.png", [(200, 0, 0), (0, 200, 0), (0, 0, 200)])
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "photos/a.png")
    names = write(tmp_path / "names.csv", "0,sky\n2,sea").classes
    folders = ["--label_dir", tmp_path / "masks", "--image_dir", tmp_path / "photos", "--classes", names]
    options = ["--dataset_mode", "custom", "--no_instance", "--label_nc", 3, "--load_size", 36, "--crop_size", 32]
    lines = spade("doctor", *options, *folders).out.splitlines()
    assert [line.split("image")[-1].strip() for line in lines[1:4]] == ["sky", "", "sea"]


@pytest.mark.parametrize("text", ["0," + "x" * 200_000, "9" * 5000 + ",sky", '0,"two\nlines"\nx,sea'])
def test_class_files_that_csv_or_int_refuse(text, tmp_path):
    path = tmp_path / "classes.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=f"--classes {path}, line"):
        find_legend(replace(CONFIG, classes=str(path)))
