"""The command line: what it offers, how options become a config, and the original's names for them."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from command import TINY, assert_refused, start
from PIL import Image

import spade_kernels
import spade_model
from spade_model import commands
from spade_model.cli import main
from spade_model.config import TrainConfig, default_train_config, load_config, save_config
from spade_model.data import DATASETS

DATA = """
    dataset_mode dataroot label_dir image_dir instance_dir label_nc contain_dontcare_label classes no_instance
    ade20k_shift preprocess_mode load_size crop_size aspect_ratio output_nc image_bits no_flip batch_size num_workers
    serial_batches max_dataset_size no_pairing_check coco_no_portraits seed
"""
MODEL = """
    netG ngf norm_G num_upsampling_layers use_vae z_dim resnet_n_downsample resnet_n_blocks resnet_kernel_size
    resnet_initial_kernel_size norm_E ndf norm_D num_D n_layers_D init_type init_variance
"""
TRAIN = """
    name checkpoints_dir continue_train which_epoch device niter niter_decay max_steps lr no_TTUR beta1 beta2
    D_steps_per_G accumulate gan_mode lambda_feat no_ganFeat_loss lambda_vgg no_vgg_loss vgg_weights lambda_kld
    r1_gamma ema_decay ema_bn_batches precision compile print_freq display_freq save_latest_freq save_minutes
    save_epoch_freq no_html tensorboard
"""
GENERATE = """
    name checkpoints_dir which_epoch checkpoint last_weights label instance style_image samples size fit results_dir
    how_many overlay device
"""
USED_TO_GENERATE = """
    dataset_mode dataroot label_dir instance_dir no_pairing_check max_dataset_size seed classes label_nc
    contain_dontcare_label no_instance ade20k_shift preprocess_mode crop_size aspect_ratio num_upsampling_layers
"""
CONVERT = "checkpoint output from to last_weights overwrite"
OPTIONS = {
    "train": TRAIN + DATA + MODEL,
    "generate": GENERATE + USED_TO_GENERATE,
    "convert": CONVERT + DATA + MODEL,
    "doctor": "split" + DATA,
}
"""Options that scripts rely on: one that leaves this list needs an entry among those that are renamed or gone."""


@pytest.fixture
def parsed(monkeypatch):
    """The config that `spade train` would run."""
    seen: list[TrainConfig] = []
    monkeypatch.setattr(commands, "train", lambda config: seen.append(config) or config.run_dir)

    def parse(*arguments: object) -> TrainConfig:
        assert main(["train", *map(str, arguments)]) == 0
        return seen.pop()

    return parse


@pytest.mark.parametrize("command", OPTIONS)
def test_help_lists_exactly_these_options(spade, command):
    result = spade(command, "--help")
    assert (result.status, result.err) == (0, "")
    # Option names begin a line; those within a description are further to the right.
    listed = re.findall(r"^[│ ]{0,2}(?:-h, )?--(\w+)", result.out, re.MULTILINE)
    assert sorted(listed) == sorted(["help", *OPTIONS[command].split()])
    assert "--no_no_" not in result.out


def test_the_last_of_a_flag_and_its_opposite_counts(parsed):
    assert parsed("--no_flip", "--no_no_flip", "--no_TTUR", "--compile", "--no_compile") == replace(
        parsed("--no_TTUR"), compile=False
    )
    assert parsed("--no_no_flip", "--no-flip").data.no_flip
    assert parsed("--dataset_mode", "ade20k", "--no_instance").data.no_instance


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_usage(spade, arguments):
    result = spade(*arguments)
    assert result.status == 0
    assert [word for word in ("train", "generate", "convert", "doctor", "torchrun") if word not in result.out] == []


def test_version(spade):
    assert spade("--version").out == f"spade-kernels {spade_kernels.__version__}\n"


def test_command_as_a_process():
    process = start(["doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert "torch" in out
    assert "reference" in out


WITHOUT_EXTRAS = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name in ("PIL", "tyro", "tqdm", "jinja2", "safetensors", "matplotlib", "tensorboard"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Missing())
from spade_model.cli import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        (["doctor"], 0, "reference", ""),
        (["--help"], 0, "usage: spade", ""),
        (["--version"], 0, "spade-kernels", ""),
        (["trian"], 2, "", "unknown command"),
        *(([name, "--help"], 2, "", 'pip install --no-build-isolation ".[model]"') for name in ("train", "doctor")),
    ],
)
def test_without_the_extra_packages(arguments, status, out, err):
    """After a plain `pip install .`: what can be done is done, and the rest says what to install."""
    command = [sys.executable, "-c", WITHOUT_EXTRAS, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert out in done.stdout
    assert err in done.stderr
    assert bool(err) == bool(done.stderr)


OMP_IN_COMMAND = """
import os, sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print("policy", os.environ.get("OMP_WAIT_POLICY"))
sys.meta_path.insert(0, Watch())
sys.argv = ["spade", "doctor"]
"""


@pytest.mark.parametrize(
    ("program", "own", "policy"),
    [
        ("import spade_model.cli; spade_model.cli.main()", None, "PASSIVE"),
        ("import spade_model.cli; spade_model.cli.main()", "ACTIVE", "ACTIVE"),
        ("import runpy; runpy.run_path('examples/toy_demo.py')", None, "PASSIVE"),
        ("import sys; sys.path.append('tests'); import conftest", None, "PASSIVE"),
        ("import spade_model.training", None, "None"),
    ],
)
def test_waiting_threads_are_passive_before_torch_is_imported(monkeypatch, program, own, policy):
    """In the command, the demo and the test run, unless the user says otherwise; a library changes no environment."""
    if own is None:
        monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    else:
        monkeypatch.setenv("OMP_WAIT_POLICY", own)
    command = [sys.executable, "-c", OMP_IN_COMMAND + program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert (done.returncode, done.stdout.splitlines()[0]) == (0, f"policy {policy}"), done.stderr


def test_the_package_names_what_it_has():
    assert [name for name in spade_model.__all__ if not callable(getattr(spade_model, name))] == []
    with pytest.raises(AttributeError, match="'spade_model' has no attribute 'nothing'"):
        _ = spade_model.nothing


def test_error_as_a_process(tmp_path):
    process = start(["train", "--name", "../x"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("spade: --name '../x' must be a plain folder name")
    assert err.count("\n") == 1


@pytest.mark.parametrize("mode", DATASETS)
def test_defaults_of_each_data_set(parsed, mode):
    assert parsed("--dataset_mode", mode) == default_train_config(mode)


def test_defaults_that_the_original_has(parsed):
    ade = parsed("--dataset_mode", "ade20k").data
    assert (ade.label_nc, ade.contain_dontcare_label, ade.no_instance, ade.semantic_nc) == (150, True, True, 151)
    coco = parsed().data
    assert (coco.dataset_mode, coco.label_nc, coco.semantic_nc, coco.load_size) == ("coco", 182, 184, 286)
    cityscapes = parsed("--dataset_mode=cityscapes").data
    assert (cityscapes.label_nc, cityscapes.semantic_nc, cityscapes.image_size) == (35, 36, (256, 512))
    assert parsed("--dataset_mode", "facades").data.semantic_nc == 13


def test_given_options_win_over_defaults(parsed):
    config = parsed(
        "--dataset_mode", "ade20k", "--label_nc", "3", "--no_no_instance", "--crop_size=128", "--lr", "1e-3"
    )
    assert (config.data.label_nc, config.data.no_instance, config.data.crop_size, config.lr) == (3, False, 128, 1e-3)
    assert config.data.contain_dontcare_label


def test_one_learning_rate_has_other_betas(parsed):
    assert (parsed().beta1, parsed().beta2) == (0.0, 0.9)
    alone = parsed("--no_TTUR")
    assert (alone.no_TTUR, alone.beta1, alone.beta2) == (True, 0.5, 0.999)
    assert parsed("--no_TTUR", "--beta1", "0.3").beta1 == 0.3


def test_pix2pixhd_has_its_own_norm(parsed):
    assert parsed("--netG", "pix2pixhd").model.norm_G == "instance"
    assert parsed("--netG", "pix2pixhd", "--norm_G", "spectralbatch").model.norm_G == "spectralbatch"
    assert parsed("--netG", "spade").model.norm_G == "spectralspadesyncbatch3x3"


def test_renamed_options(parsed):
    config = parsed("--batchSize", "3", "--nThreads=2", "--tf_log")
    assert (config.data.batch_size, config.data.num_workers, config.tensorboard) == (3, 2, True)


def test_dashes_and_underscores_are_the_same(parsed):
    assert parsed("--crop-size", "512", "--no-flip").data == replace(
        default_train_config("coco").data, crop_size=512, no_flip=True
    )


@pytest.mark.parametrize("option", commands.REMOVED_OPTIONS)
def test_options_that_are_gone_say_what_to_do(spade, option):
    assert_refused(spade("train", option, "1"), f"{option} is not an option here: {commands.REMOVED_OPTIONS[option]}")


@pytest.mark.parametrize("option", ["--config", "--load_from_opt_file"])
def test_config_file_round_trip(parsed, tmp_path, option):
    config = default_train_config("ade20k", no_TTUR=True)
    config = replace(config, name="saved", lr=0.5, model=replace(config.model, ngf=7, use_vae=True))
    save_config(config, tmp_path / "config.json")
    assert load_config(tmp_path / "config.json") == config
    assert parsed(option, tmp_path / "config.json") == config
    assert parsed(option, tmp_path / "config.json", "--ngf", "9").model == replace(config.model, ngf=9)


def test_short_config_file(parsed, tmp_path):
    (tmp_path / "mine.json").write_text('{"name": "mine", "lr": 1, "data": {"label_nc": 5}}')
    config = parsed("--config", tmp_path / "mine.json")
    assert (config.name, config.lr, config.data.label_nc, config.niter) == ("mine", 1, 5, TrainConfig().niter)


def test_continuing_takes_up_the_runs_options(parsed, trained_run):
    run = ["--name", "run", "--checkpoints_dir", trained_run.parent, "--continue_train"]
    config = parsed(*run, "--niter", "7")
    assert config == replace(load_config(trained_run / "config.json"), continue_train=True, niter=7)


def test_continuing_a_moved_run(parsed, trained_run, tmp_path):
    (tmp_path / "moved").symlink_to(trained_run)
    config = parsed("--name", "moved", "--checkpoints_dir", tmp_path, "--continue_train")
    assert config.run_dir == tmp_path / "moved"
    assert config.model.ngf == 2


def test_train_then_generate(spade, tmp_path):
    run = ["--name", "run", "--checkpoints_dir", tmp_path]
    trained = spade("train", *TINY, *run, "--no_no_html")
    assert trained.status == 0
    assert trained.out == f"saved in {tmp_path / 'run'}; samples and loss curves: {tmp_path / 'run/web/index.html'}\n"
    made = spade(
        "generate", *run, "--results_dir", tmp_path / "results", "--how_many", "2", "--overlay", "--device", "cpu"
    )
    page = tmp_path / "results/run/latest/index.html"
    assert (made.status, made.out) == (0, f"2 images of 2 masks, and their page: {page}\n")
    names = {path.relative_to(page.parent / "images") for path in page.parent.rglob("*.png")}
    columns = ("input_label", "synthesized_image", "overlay")
    assert names == {Path(column) / f"toy_{i:06d}.png" for column in columns for i in range(2)}


def test_generate_takes_all_options_that_agree_with_the_checkpoint(spade, trained_run, tmp_path):
    run = ["--name", "run", "--checkpoints_dir", trained_run.parent, "--results_dir", tmp_path, "--how_many", 1]
    assert spade("generate", *run, "--batch_size", 3, "--ngf", 2, "--no_flip", "--label_nc", 7).status == 0


def save_picture(path: Path, size: tuple[int, int] = (40, 32), value: int = 1, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("L", size, value).save(path, **({"exif": exif} if orientation != 1 else {}))


def test_doctor_reads_custom_data_once_and_sums_up(spade, tmp_path):
    for name, value in (("a", 1), ("b", 20), ("c", 40)):
        save_picture(tmp_path / f"masks/{name}.png", value=value)
        save_picture(tmp_path / f"photos/{name}.jpg")
    data = ["--dataset_mode", "custom", "--label_dir", tmp_path / "masks", "--image_dir", tmp_path / "photos"]
    data += ["--output_nc", 1]
    result = spade("doctor", *data, "--no_instance")
    assert result.status == 2
    lines = result.out.splitlines()
    assert lines[:5] == [
        "train: 3 ids in 3 label images, share of pixels:",
        *(f"{number:7}   33.33%  in 1 image" for number in (1, 20, 40)),
        "error in 2 places: Set --label_nc to at least 41, or correct the image:",
    ]
    assert [line.partition(": ")[0] for line in lines[5:7]] == [f"    {tmp_path}/masks/{name}.png" for name in "bc"]
    assert lines[7].startswith("warning: the ids have gaps: 3 of 0..40 occur. ")
    assert lines[8:] == ["train: 3 problems in 3 items"]
    save_picture(tmp_path / "masks/b.png", value=0)
    save_picture(tmp_path / "masks/c.png", value=2)
    assert spade("doctor", *data, "--no_instance").out.splitlines()[-1] == "train: no problems in 3 items"
    (tmp_path / "masks/a.png").unlink()
    save_picture(tmp_path / "masks/sub/a.png")
    assert_refused(spade("doctor", *data, "--no_instance"), f"subfolder, {tmp_path}/photos/sub/a.*", "2 problems")


def test_doctor_says_all_that_the_options_lack(spade):
    result = spade("doctor", "--dataset_mode", "custom", "--label_dir", "nope")
    assert_refused(result, "error: --dataset_mode custom needs --image_dir", "--instance_dir", "nope: no such folder")
    assert_refused(spade("doctor", "--label_nc", 20), "datasets/train_label: no such folder", "--dataroot")


def test_doctor_finds_nothing_wrong_with_the_toy_data(spade):
    result = spade("doctor", "--dataset_mode", "toy")
    assert (result.status, result.out) == (0, "train: no problems\nval: no problems\n")
