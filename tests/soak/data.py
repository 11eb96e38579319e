"""Data sets with one fault each; `spade doctor` and `spade train` have to name it."""

from __future__ import annotations

import contextlib
import io
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image
from test_data_check import BAD_FILES, ids, make_coco, rgb, save

from spade_model.cli import main

# For each fault, a function that damages the folder of a data set, and a text that the messages must contain.
_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no such folder": (shutil.rmtree, "no such folder"),
    "no labels": (lambda r: shutil.rmtree(r / "train_label"), "train_label"),
    "no photographs": (lambda r: shutil.rmtree(r / "train_img"), "train_img"),
    "no instances": (lambda r: shutil.rmtree(r / "train_inst"), "train_inst"),
    "a label is missing": (lambda r: (r / "train_label/1.png").unlink(), "1.jpg"),
    "a photograph is missing": (lambda r: (r / "train_img/1.jpg").unlink(), "1.png"),
    "an instance image is missing": (lambda r: (r / "train_inst/1.png").unlink(), "1."),
    "another name": (lambda r: (r / "train_img/1.jpg").rename(r / "train_img/2.jpg"), "train_img"),
    "two labels for a photograph": (lambda r: save(r / "train_label/1.bmp", ids()), "1."),
    "a folder for a file": (lambda r: _unlink(r / "train_label/1.png").mkdir(), "train_"),
    "a link to nowhere": (lambda r: _unlink(r / "train_label/1.png").symlink_to(r / "nowhere.png"), "1."),
    "a link to itself": (lambda r: _unlink(r / "train_img/1.jpg").symlink_to(r / "train_img/1.jpg"), "1."),
    "photograph of another size": (lambda r: save(r / "train_img/1.jpg", rgb()[:20]), "1.jpg"),
    "instances of another size": (lambda r: save(r / "train_inst/1.png", ids()[:20]), "1.png"),
    "an enormous picture": (lambda r: Image.new("1", (20_000, 20_000)).save(r / "train_label/1.png"), "1.png"),
}


def _unlink(path: Path) -> Path:
    path.unlink()
    return path


def _file_fault(name: str) -> tuple[Callable[[Path], object], str]:
    file, damage, _ = BAD_FILES[name]
    return lambda root: damage(root / file), Path(file).name


FAULTS = _FOLDERS | {f"file: {name}": _file_fault(name) for name in BAD_FILES}


def data_sets(folder: Path, count: int = len(FAULTS)) -> dict[str, int]:
    """Runs doctor and train on data sets with one fault each: both name the fault, and train leaves no folder."""
    for number, (name, (damage, text)) in enumerate(list(FAULTS.items())[:count]):
        root = folder / str(number)
        make_coco(root)
        damage(root)
        data = ["--dataset_mode", "coco", "--dataroot", root, "--load_size", "36", "--crop_size", "32"]
        runs = folder / "runs"
        options = ["--batch_size", "2", "--ngf", "2", "--ndf", "2", "--no_vgg_loss", "--checkpoints_dir", runs]
        for arguments in (["doctor", "--split", "train", *data], ["train", *data, *options, "--niter", "1"]):
            status, output = _spade(*arguments)
            assert (status, text in output, "Traceback" in output) == (2, True, False), (name, arguments[0], output)
        assert not runs.exists(), f"{name}: a folder is left of a run that did not start"
    return {"data sets": count, "named by doctor and by train": count}


def _spade(*arguments: object) -> tuple[int, str]:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        status = main([str(argument) for argument in arguments])
    return status, output.getvalue()
