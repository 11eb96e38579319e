"""Damaged, foreign and hostile files, and places that cannot be written: one message, and what was there stays."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command import TINY, assert_refused
from PIL import Image
from safetensors.torch import save_file

from spade_model import checkpoint
from spade_model.config import default_train_config, load_config, save_config
from spade_model.errors import UserError
from spade_model.files import lock, remove_leftovers, replacing
from spade_model.networks import ConvEncoder, MultiscaleDiscriminator, SPADEGenerator
from spade_model.pages import write_results_page
from spade_model.training import train


@pytest.fixture
def run_copy(trained_run, tmp_path) -> Path:
    return Path(shutil.copytree(trained_run, tmp_path / "runs" / "run"))


def generate_arguments(file: Path, tmp_path: Path) -> list[object]:
    return ["generate", "--checkpoint", file, "--results_dir", tmp_path / "results", "--device", "cpu"]


def cut(share: float) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[8:40] = bytes(32)
    path.write_bytes(data)


def save_tree(path: Path, tree: str) -> None:
    save_file({"a": torch.zeros(1)}, path, metadata={"tree": tree})


BAD_CHECKPOINTS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "zero bytes": (lambda p: p.write_bytes(b""), ["truncated", "earlier checkpoint"]),
    "seven bytes": (lambda p: p.write_bytes(p.read_bytes()[:7]), ["truncated", "earlier checkpoint"]),
    "half of the header": (lambda p: p.write_bytes(p.read_bytes()[:200]), ["truncated", "earlier checkpoint"]),
    "half": (cut(0.5), ["truncated", "earlier checkpoint"]),
    "all but the end": (cut(0.999), ["truncated", "earlier checkpoint"]),
    "damaged header": (flip_header, ["truncated or not a safetensors file"]),
    "text": (lambda p: p.write_text("hello " * 100), ["truncated or not a safetensors file"]),
    "a folder": (lambda p: (p.unlink(), p.mkdir()), ["latest.safetensors"]),
    "tensors alone": (lambda p: save_file({"fc.weight": torch.zeros(1)}, p), ["not a training checkpoint"]),
    "without config": (
        lambda p: checkpoint.save(p, {"G": {"a": torch.zeros(1)}}),
        ["holds no config", "`spade train`"],
    ),
    "damaged tree": (lambda p: save_tree(p, '{"G": '), ["damaged", "not JSON", "earlier checkpoint"]),
    "tree of another kind": (lambda p: save_tree(p, "[1, 2]"), ["not a training checkpoint", "list"]),
    "deep tree": (lambda p: save_tree(p, "[" * 100_000), ["truncated or not a safetensors file", "recursion"]),
    "tree without its tensor": (lambda p: save_tree(p, '{"config": {"__tensor__": "b"}}'), ["latest.safetensors", "b"]),
}


@pytest.mark.parametrize("name", BAD_CHECKPOINTS)
def test_bad_checkpoint(spade, run_copy, tmp_path, name):
    damage, fragments = BAD_CHECKPOINTS[name]
    file = run_copy / "latest.safetensors"
    damage(file)
    assert_refused(spade(*generate_arguments(file, tmp_path)), *fragments)
    continued = spade("train", "--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train")
    assert_refused(continued, "latest.safetensors", fragments[0])


def edit_config(**changes) -> Callable[[Path], object]:
    return lambda path: path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_CONFIGS: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "cut": (cut(0.5), ["config.json", "not valid JSON"]),
    "empty": (lambda p: p.write_text(""), ["config.json", "not valid JSON"]),
    "binary": (lambda p: p.write_bytes(b"\xff\xfe\x00"), ["config.json", "not valid JSON"]),
    "a list": (lambda p: p.write_text("[1]"), ["config.json", "[1]", "JSON object"]),
    "unknown option": (edit_config(colour="red"), ["config.json", "'colour'", "another version"]),
    "unknown option, nested": (edit_config(model={"nfg": 3}), ["config.json", "'nfg'"]),
    "another type": (edit_config(niter="many"), ["config.json", "'niter'", "'many'", "50"]),
    "number for a flag": (edit_config(no_TTUR=1), ["config.json", "'no_TTUR'", "False"]),
    "group is a number": (edit_config(data=3), ["config.json", "DataConfig", "3", "JSON object"]),
    "not a choice": (edit_config(data={"dataset_mode": "voc"}), ["'dataset_mode'", "'voc'", "coco, ade20k"]),
    "not in range": (edit_config(lr=float("nan")), ["--lr nan", "greater than 0"]),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config(spade, run_copy, name):
    damage, fragments = BAD_CONFIGS[name]
    damage(run_copy / "config.json")
    result = spade("train", "--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train")
    assert_refused(result, *fragments)


def test_config_file_missing(spade, tmp_path):
    assert_refused(spade("train", "--config", tmp_path / "nowhere.json"), "nowhere.json", "No such file")


CONTINUED: dict[str, tuple[list[str], list[str]]] = {
    "wider": (["--ngf", "4"], ["another architecture", "fc.weight has shape (32, 8", "network (64, 8", "ngf"]),
    "vae": (["--use_vae"], ["another architecture", "use_vae"]),
    "classes": (["--label_nc", "9"], ["another architecture", "label_nc"]),
    "grey": (["--output_nc", "1"], ["another architecture", "conv_img.weight has shape (3, ", "output_nc"]),
    "batch of more images than there are": (["--batch_size", "8"], ["4 images, fewer than one batch", "--batch_size"]),
    "accumulate": (["--accumulate", "3"], ["--accumulate 3", "2 batches of an epoch"]),
    "average": (["--ema_decay", "0.9"], ["holds no G_ema", "trained with"]),
    "epoch": (["--which_epoch", "7"], ["7.safetensors", "does not exist", "--which_epoch"]),
    "without its option": ([], ["already holds a trained model", "--continue_train", "--name"]),
}


@pytest.mark.parametrize("name", CONTINUED)
def test_continuing_otherwise_leaves_the_run_alone(spade, run_copy, name):
    options, fragments = CONTINUED[name]
    before = {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()}
    first = ["--continue_train"] if options else TINY
    result = spade("train", *first, "--name", "run", "--checkpoints_dir", run_copy.parent, *options)
    assert_refused(result, *fragments)
    assert {path: path.read_bytes() for path in run_copy.rglob("*") if path.is_file()} == before


class _WritesFile:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def generator_state(semantic_nc: int = 8) -> dict[str, torch.Tensor]:
    return SPADEGenerator(semantic_nc, ngf=2, crop_size=32).state_dict()


def prune(state: dict, **changes) -> dict:
    return {**state, **changes}


FOREIGN: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "code in a PyTorch file": (
        lambda p: torch.save({"a": _WritesFile(p.with_name("canary"))}, p),
        ["was refused", "run code", "state dict"],
    ),
    "code in a plain pickle": (
        lambda p: p.write_bytes(pickle.dumps(_WritesFile(p.with_name("canary")), protocol=2)),
        ["was refused", "run code"],
    ),
    "whole module": (lambda p: torch.save(torch.nn.Linear(1, 1), p), ["was refused", "weights only"]),
    "list": (lambda p: torch.save([1, 2], p), ["does not hold a state dict"]),
    "numbers": (lambda p: torch.save({"a": 1}, p), ["does not hold a state dict"]),
    "empty": (lambda p: torch.save({}, p), ["does not hold a state dict"]),
    "zero bytes": (lambda p: p.write_bytes(b""), ["truncated", "again"]),
    "text": (lambda p: p.write_text("hello"), ["net_G.pth"]),
    "cut": (lambda p: (torch.save(generator_state(), p), cut(0.7)(p)), ["truncated", "again"]),
    "discriminator": (
        lambda p: torch.save(MultiscaleDiscriminator(8, ndf=2).state_dict(), p),
        ["not hold a SPADE generator", "fc.weight is missing", "discriminator's weights", "_net_G.pth"],
    ),
    "encoder": (
        lambda p: torch.save(ConvEncoder(ngf=2).state_dict(), p),
        ["not hold a SPADE generator", "encoder's weights", "_net_G.pth"],
    ),
    "other classes": (
        lambda p: torch.save(generator_state(30), p),
        ["30 condition channels", "--label_nc 7", "trained with"],
    ),
    "odd shapes": (
        lambda p: torch.save(prune(generator_state(), **{"fc.weight": torch.zeros(3)}), p),
        ["not hold a SPADE generator", "fc.weight has shape (3,)"],
    ),
    "missing layer": (
        lambda p: torch.save({k: v for k, v in generator_state().items() if not k.startswith("up_1")}, p),
        ["another architecture", "up_1", "missing"],
    ),
    "even kernel": (
        lambda p: torch.save(
            prune(generator_state(), **{"head_0.norm_0.mlp_shared.0.weight": torch.zeros(128, 8, 2, 2)}), p
        ),
        ["2x2", "odd"],
    ),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_weights(spade, tmp_path, name):
    write, fragments = FOREIGN[name]
    file = tmp_path / "latest_net_G.pth"
    write(file)
    result = spade(*generate_arguments(file, tmp_path), "--dataset_mode", "toy", "--crop_size", "32")
    assert_refused(result, *fragments)
    assert not (tmp_path / "canary").exists()


FORMATS: dict[str, tuple[Callable[[Path], object], Callable[[Path], object]]] = {
    "PyTorch": (lambda p: torch.save({"a": torch.ones(3, 3)}, p), checkpoint.read_state_dict),
    "old PyTorch": (
        lambda p: torch.save({"a": torch.ones(3, 3)}, p, _use_new_zipfile_serialization=False),
        checkpoint.read_state_dict,
    ),
    "safetensors": (lambda p: checkpoint.save(p, {"a": torch.ones(3, 3), "b": {1: [2.0]}}), checkpoint.load),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("name", FORMATS)
def test_damage_anywhere_is_a_readable_error(tmp_path, name):
    write, read = FORMATS[name]
    file = tmp_path / "file"
    write(file)
    whole, random = file.read_bytes(), np.random.default_rng(0)
    for _ in range(200):
        data = bytearray(whole)
        data[int(random.integers(len(data)))] = int(random.integers(256))
        file.write_bytes(data[: int(random.integers(len(data)))] if random.random() < 0.2 else data)
        with suppress(UserError):  # files of PyTorch have no checksum that it compares
            read(file)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_no_flipped_bit_is_taken_for_a_weight(tmp_path, dtype):
    file = tmp_path / "latest.safetensors"
    tree = {"G": {"a": torch.ones(3, 2).to(dtype), "b": torch.ones(()).to(dtype)}, "steps": 7, "empty": torch.ones(0)}
    checkpoint.save(file, tree)
    whole, names = file.read_bytes(), sorted(tree)
    for bit in range(0, 8 * len(whole), 7):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        file.write_bytes(data)
        try:
            loaded = checkpoint.load(file)
        except UserError as error:
            assert str(file) in str(error)  # noqa: PT017 (the file may also be read, if it reads the same)
        else:
            assert sorted(loaded) == names
            assert loaded["steps"] == 7
            assert torch.equal(loaded["G"]["a"], tree["G"]["a"])
            assert torch.equal(loaded["G"]["b"], tree["G"]["b"])


def test_checkpoints_without_checksums_load(tmp_path):
    """Those of earlier versions."""
    save_file({"a": torch.ones(2)}, tmp_path / "old.safetensors", metadata={"tree": '{"G": {"__tensor__": "a"}}'})
    assert torch.equal(checkpoint.load(tmp_path / "old.safetensors")["G"], torch.ones(2))


def test_a_damaged_state_names_the_epoch_to_go_on_from(spade, run_copy):
    for epoch in (2, 10):
        shutil.copy(run_copy / "latest.safetensors", run_copy / f"{epoch}.safetensors")
    whole = bytearray((run_copy / "latest.safetensors").read_bytes())
    whole[-5] ^= 1
    (run_copy / "latest.safetensors").write_bytes(whole)
    resume = ["train", "--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train", "--niter"]
    assert_refused(spade(*resume, 2), "latest.safetensors is damaged", "--which_epoch 10 is the newest")
    assert spade(*resume, 2, "--which_epoch", 10).status == 0
    # The next time the run goes on from its latest state again.
    assert spade(*resume, 3).status == 0
    assert checkpoint.load(run_copy / "latest.safetensors")["steps"] == 6


VGG: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "another network": (lambda p: torch.save(generator_state(), p), ["VGG19's weights", "features.0.weight", "vgg19-"]),
    "code": (lambda p: torch.save({"a": _WritesFile(p.with_name("canary"))}, p), ["was refused", "run code"]),
    "cut": (lambda p: (torch.save(generator_state(), p), cut(0.5)(p)), ["truncated"]),
}


@pytest.mark.parametrize("name", VGG)
def test_bad_vgg_weights(spade, tmp_path, name):
    write, fragments = VGG[name]
    file = tmp_path / "vgg19.pth"
    write(file)
    options = ["--no_no_vgg_loss", "--vgg_weights", file, "--checkpoints_dir", tmp_path / "runs"]
    assert_refused(spade("train", *TINY, *options), "vgg19.pth", *fragments)
    assert not (tmp_path / "canary").exists()


def save_labels(path: Path, value: int = 0, size: tuple[int, int] = (32, 32)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", size, value).save(path)
    return path


GENERATE: dict[str, tuple[Callable[[Path], list[object]], list[str]]] = {
    "no label": (lambda t: ["--label", t / "no.png"], ["--label", "no.png", "does not exist"]),
    "empty folder": (lambda t: ["--label", t], ["--label", "no images", ".png"]),
    "instance missing": (
        lambda t: ["--label", save_labels(t / "a.png")],
        ["a.png", "no instance image", "Give one with --instance"],
    ),
    "instance file missing": (
        lambda t: ["--label", save_labels(t / "a.png"), "--instance", t / "b.png"],
        ["--instance", "b.png", "does not exist"],
    ),
    "one of the instances missing": (
        lambda t: [
            "--label",
            save_labels(t / "a/1.png").parent,
            "--instance",
            save_labels(t / "b" / "2.png").parent,
        ],
        ["b/1.png", "No such file"],
    ),
    "file and folder": (
        lambda t: ["--label", save_labels(t / "a.png"), "--instance", t],
        ["--label", "--instance", "both be files, or both folders"],
    ),
    "instance alone": (lambda t: ["--instance", save_labels(t / "a.png")], ["--instance", "needs the --label"]),
    "ids too large": (
        lambda t: ["--label", save_labels(t / "a.png", 9), "--instance", save_labels(t / "b.png")],
        ["a.png", "id 9", "x=0, y=0", "1024 of 1024", "The model knows the ids 0..6: correct the image"],
    ),
    "ids of the val split too large": (
        lambda t: [
            *("--dataset_mode", "custom", "--label_dir", save_labels(t / "a/1.png", 9).parent),
            *("--instance_dir", save_labels(t / "b/1.png").parent),
        ],
        ["1.png", "id 9", "The model knows the ids 0..6: correct the image"],
    ),
    "more classes": (
        lambda t: ["--label", save_labels(t / "a.png", 9), "--label_nc", "10"],
        ["trained with --label_nc 7, not with --label_nc 10", "leave the option out"],
    ),
    "unknown class": (
        lambda t: ["--contain_dontcare_label"],
        ["trained without --contain_dontcare_label, not with --contain_dontcare_label"],
    ),
    "instance of another size": (
        lambda t: ["--label", save_labels(t / "a.png"), "--instance", save_labels(t / "b.png", size=(16, 16))],
        ["b.png", "16x16", "32x32", "same size"],
    ),
    "style without vae": (lambda t: ["--style_image", save_labels(t / "a.png")], ["--style_image", "--use_vae"]),
    "samples without vae": (lambda t: ["--samples", "3"], ["--samples 3", "--use_vae"]),
    "size between multiples": (
        lambda t: ["--dataset_mode", "custom", "--crop_size", "100", "--preprocess_mode", "resize_and_crop"],
        ["100x100", "makes 96x96", "multiples of 32"],
    ),
    "crop_size": (
        lambda t: ["--label", save_labels(t / "a.png"), "--crop_size", "64"],
        ["--crop_size 64", "--size and --fit"],
    ),
    "every mask of a folder": (
        lambda t: [
            *("--label", (save_labels(t / "a/1.png", 9).parent, save_labels(t / "a/2.png", 8))[0]),
            *("--instance", save_labels(t / "b/1.png").parent),
        ],
        ["1.png: id 9", "2.png: id 8"],
    ),
    "no size": (
        lambda t: ["--label", save_labels(t / "a.png"), "--size", "12x"],
        ["--size '12x'", "WIDTHxHEIGHT", "640x480"],
    ),
    "size of millions": (
        lambda t: ["--label", save_labels(t / "a.png"), "--size", "99999"],
        ["--size '99999'", "at most"],
    ),
    "size without label": (lambda t: ["--size", "64"], ["--size 64", "--label", "--crop_size"]),
    "fit": (lambda t: ["--fit", "squash"], ["squash", "pad", "crop", "stretch"]),
    "no samples": (lambda t: ["--samples", "0"], ["--samples 0", "at least 1"]),
    "epoch missing": (lambda t: ["--which_epoch", "9"], ["9.safetensors", "--which_epoch", "--checkpoint"]),
    "another model": (lambda t: ["--ngf", "4"], ["latest.safetensors was trained with --ngf 2, not with --ngf 4"]),
    "results under a file": (lambda t: ["--results_dir", save_labels(t / "a.png")], ["a.png", "cannot write"]),
    "results in /proc": (lambda t: ["--results_dir", "/proc/x"], ["/proc/x", "cannot write"]),
}


@pytest.mark.parametrize("name", GENERATE)
def test_generate_refuses(spade, trained_run, tmp_path, name):
    options, fragments = GENERATE[name]
    run = ["--name", "run", "--checkpoints_dir", trained_run.parent, "--results_dir", tmp_path / "results"]
    assert_refused(spade("generate", *run, "--device", "cpu", *options(tmp_path)), *fragments)
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("folder", ["under a file", "/proc"])
def test_runs_where_nothing_can_be_written(spade, tmp_path, folder):
    runs = Path("/proc/x") if folder == "/proc" else save_labels(tmp_path / "a.png") / "runs"
    assert_refused(spade("train", *TINY, "--checkpoints_dir", runs), "cannot write", str(runs), "--checkpoints_dir")


@pytest.mark.parametrize("fault", ["tensorboard", "first label image", "size", "memory", "Ctrl-C"])
def test_a_failed_start_leaves_no_folder(spade, tmp_path, monkeypatch, fault):
    def fail(*arguments, **options):
        raise KeyboardInterrupt if fault == "Ctrl-C" else torch.OutOfMemoryError("out of memory")

    options: list[object] = []
    if fault == "tensorboard":
        monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
        options = ["--tensorboard"]
    elif fault in ("first label image", "size"):
        for kind in ("labels", "images"):
            for number in range(2):
                save_labels(tmp_path / f"data/{kind}/{number}.png", 200 if fault != "size" and kind == "labels" else 1)
        options = ["--dataset_mode", "custom", "--no_instance", "--label_dir", tmp_path / "data/labels"]
        options += ["--image_dir", tmp_path / "data/images"]
        options += ["--preprocess_mode", "none", "--crop_size", "64"] if fault == "size" else []
    else:
        monkeypatch.setattr("spade_model.trainer.Trainer.step", fail)
    result = spade("train", *TINY, "--no_no_html", "--checkpoints_dir", tmp_path / "new/runs", *options)
    assert result.status == (130 if fault == "Ctrl-C" else 2), result
    assert not (tmp_path / "new").exists()


def test_a_failed_start_leaves_the_folder_of_others(spade, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/notes.txt").write_text("mine")
    arguments = [*TINY, "--tensorboard", "--checkpoints_dir", tmp_path, "--name", "run"]
    assert spade("train", *arguments).status == 2
    assert (tmp_path / "run/notes.txt").read_text() == "mine"


def test_a_run_that_another_process_trains(spade, run_copy):
    """The other process is of two kinds: it still trains, or it saved after this one had looked."""
    arguments = ["train", "--name", "run", "--checkpoints_dir", run_copy.parent, "--continue_train", "--niter", "2"]
    ready, done = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        held = lock(run_copy / ".lock")
        os.write(ready[1], b"1")
        os.read(done[0], 1)
        os._exit(int(held.closed))
    os.read(ready[0], 1)
    before = (run_copy / "latest.safetensors").read_bytes()
    assert_refused(spade(*arguments), "another process trains", str(run_copy), "another --name")
    os.write(done[1], b"1")
    os.waitpid(child, 0)
    assert (run_copy / "latest.safetensors").read_bytes() == before
    assert spade(*arguments).status == 0


def disk_full(*arguments, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


TREE = {"G": {"a": torch.arange(1000.0)}, "config": {}}


@pytest.mark.parametrize("step", ["spade_model.checkpoint.save_file", "spade_model.files.os.replace"])
def test_full_disk_keeps_the_previous_checkpoint(tmp_path, monkeypatch, step):
    file = tmp_path / "latest.safetensors"
    checkpoint.save(file, TREE)
    before = file.read_bytes()

    monkeypatch.setattr(step, disk_full)
    with pytest.raises(UserError, match=r"latest\.safetensors.*No space left.*untouched.*Free some space"):
        checkpoint.save(file, TREE)
    assert [path.name for path in tmp_path.iterdir()] == ["latest.safetensors"]
    assert file.read_bytes() == before


def test_a_disk_that_is_really_full(tmp_path):
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(tmp_path)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        file = tmp_path / "latest.safetensors"
        checkpoint.save(file, TREE)
        with pytest.raises(UserError, match=r"latest\.safetensors.*untouched.*Free some space"):
            checkpoint.save(file, {"G": {"a": torch.zeros(2**18)}})
        assert [path.name for path in tmp_path.iterdir()] == ["latest.safetensors"]
        assert torch.equal(checkpoint.load(file)["G"]["a"], TREE["G"]["a"])
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_have_the_permissions_that_the_umask_leaves(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        checkpoint.save(tmp_path / "latest.safetensors", TREE)
        save_config(default_train_config("toy"), tmp_path / "config.json")
        write_results_page(tmp_path, "page", ["picture"], [("a", [Image.new("L", (2, 2))])])
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == dict.fromkeys(("latest.safetensors", "config.json", "index.html", "a.png"), mode)


def test_what_a_killed_save_left_is_removed(tmp_path):
    """A process that dies while it writes leaves its temporary files, and those of safetensors beside them."""
    file = tmp_path / "web" / "latest.safetensors"
    if (child := os.fork()) == 0:
        with replacing(file) as temporary:
            temporary.write_bytes(b"a")
            temporary.with_name(".tmp123").write_bytes(b"b")
            os._exit(0)
    os.waitpid(child, 0)
    (tmp_path / "old.safetensors.partial").write_bytes(b"c")
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 3
    remove_leftovers(tmp_path)
    assert list(tmp_path.rglob("*")) == [tmp_path / "web"]


def test_saving_below_a_file_says_so(tmp_path):
    (tmp_path / "runs").write_text("")
    with pytest.raises(UserError, match=r"could not save .*runs/latest\.safetensors.*(exists|directory)"):
        checkpoint.save(tmp_path / "runs" / "latest.safetensors", TREE)


def test_config_is_replaced_whole(tmp_path, monkeypatch):
    file, config = tmp_path / "config.json", default_train_config("toy")
    save_config(config, file)
    monkeypatch.setattr("spade_model.files.os.replace", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_config(replace(config, name="other"), file)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    assert load_config(file) == config


def test_library_callers_get_the_same_errors(run_copy):
    with pytest.raises(UserError, match="already holds a trained model"):
        train(replace(load_config(run_copy / "config.json"), checkpoints_dir=str(run_copy.parent)))
