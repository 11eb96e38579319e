"""Training runs: resuming is bitwise, processes add up, averages and pages appear."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from spade_model import checkpoint
from spade_model.config import ModelConfig, TrainConfig, default_train_config
from spade_model.generation import generate
from spade_model.losses import vgg_loss
from spade_model.networks import VGG19Features, load_vgg19
from spade_model.training import train


def small_config(folder: Path, **changes) -> TrainConfig:
    """Toy landscapes of 32 x 32 pixels, 6 batches an epoch, networks of a few channels."""
    config = default_train_config("toy")
    data = replace(config.data, crop_size=32, load_size=32, batch_size=2, max_dataset_size=12)
    data = replace(data, **changes.pop("data", {}))
    model = replace(ModelConfig(ngf=2, ndf=2, z_dim=4), **changes.pop("model", {}))
    settings = {"no_vgg_loss": True, "print_freq": 1, "display_freq": 1000, "no_html": True}
    settings |= {"niter": 3, "niter_decay": 2} | changes
    return replace(config, name="run", checkpoints_dir=str(folder), data=data, model=model, **settings)


def flat(tree, name: str = "") -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint by path."""
    if isinstance(tree, torch.Tensor):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    return {path: t for key, value in items for path, t in flat(value, f"{name}/{key}").items()}


def assert_same_state(one: Path, other: Path) -> None:
    first, second = (checkpoint.load(path / "latest.safetensors") for path in (one, other))
    assert [first[k] for k in ("epoch", "images_done", "steps")] == [
        second[k] for k in ("epoch", "images_done", "steps")
    ]
    first, second = flat(first), flat(second)
    assert first.keys() == second.keys()
    different = [name for name in first if not torch.equal(first[name], second[name])]
    assert different == []


def losses(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


VARIANTS = {
    "workers 0": {},
    "workers 2": {"data": {"num_workers": 2}},
    "vae, average, accumulate": {"model": {"use_vae": True}, "ema_decay": 0.9, "accumulate": 2, "niter": 6},
    "bf16, instance edges off": {"precision": "bf16", "data": {"no_instance": True}},
    "bf16, r1": {"precision": "bf16", "r1_gamma": 10.0, "gan_mode": "w"},
}


def test_moving_averages_are_found_under_their_old_name(tmp_path):
    file = tmp_path / "old.safetensors"
    checkpoint.save(file, {"G_average": {"a": torch.ones(2)}, "steps": 1})
    assert set(checkpoint.load(file)) == {"G_ema", "steps"}
    assert torch.equal(checkpoint.load_part(file, "G_ema")["G_ema"]["a"], torch.ones(2))


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_run_is_bitwise_the_same(tmp_path, name):
    """20 steps in one go equal 9, a stop in the middle of an epoch, and 11 more."""
    variant = VARIANTS[name]
    whole = train(small_config(tmp_path / "whole", max_steps=20, **variant))
    train(small_config(tmp_path / "parts", max_steps=9, **variant))
    parts = train(small_config(tmp_path / "parts", max_steps=20, continue_train=True, **variant))
    assert_same_state(whole, parts)
    assert losses(whole) == losses(parts)


def test_resuming_with_another_batch_size(tmp_path, caplog):
    """8 of 12 images are done in batches of two; the other 4 are one batch of four, as are 12 in three steps."""
    train(small_config(tmp_path, max_steps=4))
    other = {"niter": 2, "niter_decay": 0, "continue_train": True, "data": {"batch_size": 4}}
    with caplog.at_level("INFO", "spade_model"):
        run = train(small_config(tmp_path, **other))
    assert caplog.messages[0] == (
        "continuing run at step 4, epoch 1: --batch_size 4 instead of 2; "
        "the 4 images left of the epoch are shared out anew"
    )
    assert [line["epoch"] for line in losses(run)] == [1, 1, 1, 1, 1, 2, 2, 2]
    caplog.clear()
    with caplog.at_level("INFO", "spade_model"):
        train(small_config(tmp_path, accumulate=2, **{**other, "niter": 3}))
    assert caplog.messages[0].startswith("continuing run at step 8, epoch 2: --accumulate 2 instead of 1; the 0 images")
    assert checkpoint.load(run / "latest.safetensors")["steps"] == 9


@pytest.mark.parametrize("position", [{"batches_done": 3}, {"images_done": 6}])
def test_position_of_checkpoints_of_earlier_versions(tmp_path, position):
    """They count the batches of each process."""
    whole = train(small_config(tmp_path / "whole", max_steps=5))
    part = train(small_config(tmp_path / "part", max_steps=3))
    file = part / "latest.safetensors"
    state = checkpoint.load(file)
    assert state.pop("images_done") == 6
    checkpoint.save(file, state | position)
    train(small_config(tmp_path / "part", max_steps=5, continue_train=True))
    assert_same_state(whole, part)


@pytest.mark.parametrize(
    ("limit", "said"),
    [
        ({"niter": 1, "niter_decay": 0}, "all epochs of run are done (step 6 of 6): raise --niter to train on"),
        ({"max_steps": 2}, "all steps of run are done (step 2 of 2): raise --max_steps to train on"),
    ],
)
def test_continuing_a_finished_run_says_so(tmp_path, caplog, limit, said):
    train(small_config(tmp_path, **limit))
    with caplog.at_level("INFO", "spade_model"):
        train(small_config(tmp_path, continue_train=True, **limit))
    assert [record.getMessage() for record in caplog.records][-1] == said


def test_learning_rate_decays_to_zero_and_epochs_are_kept(tmp_path):
    run = train(small_config(tmp_path, save_epoch_freq=2))
    state = checkpoint.load(run / "latest.safetensors")
    assert state["steps"] == 30
    assert sorted(p.name for p in run.glob("*.safetensors")) == ["2.safetensors", "4.safetensors", "latest.safetensors"]
    assert state["optimizer_G"]["param_groups"][0]["lr"] == pytest.approx(0.0001 / 2)


@pytest.mark.parametrize(("minutes", "saves"), [(1e-9, 4), (0.0, 1), (10.0, 1)])
def test_saving_by_time(tmp_path, monkeypatch, minutes, saves):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda path, state: saved.append(state["steps"]))
    train(small_config(tmp_path, max_steps=4, save_minutes=minutes))
    # The last state is saved at the end, too, where no file is found.
    assert sorted(set(saved)) == list(range(5 - saves, 5))


def test_the_pace_is_said_after_four_steps(tmp_path, caplog):
    with caplog.at_level("INFO", "spade_model"):
        train(small_config(tmp_path, max_steps=6))
    lines = [line.split()[0] for line in caplog.messages]
    assert lines.index("step") == 0
    assert [" seconds per step: the next checkpoint in " in line for line in caplog.messages].index(True) == 4


def test_continuing_from_a_kept_epoch(tmp_path):
    run = train(small_config(tmp_path, save_epoch_freq=1, max_steps=20))
    before = losses(run)
    train(small_config(tmp_path, save_epoch_freq=1, max_steps=20, continue_train=True, which_epoch="2"))
    assert losses(run) == before


@pytest.mark.parametrize("mode", ["hinge", "ls", "original", "w"])
def test_every_gan_mode_trains(tmp_path, mode):
    run = train(small_config(tmp_path, gan_mode=mode, max_steps=2, D_steps_per_G=2))
    first, second = losses(run)
    assert "GAN" in first
    assert "GAN" not in second, "D_steps_per_G 2: the generator steps every other time"


@pytest.mark.parametrize("norm", ["none", "spectralinstance", "batch", "spectralsyncbatch"])
def test_gradient_penalty_with_every_norm(tmp_path, norm):
    variant = {"max_steps": 2, "r1_gamma": 10.0, "gan_mode": "w", "model": {"norm_D": norm, "use_vae": True}}
    run = train(small_config(tmp_path, accumulate=2, **variant))
    assert [line["D_R1"] > 0 for line in losses(run)] == [True, True]


def test_page_and_tensorboard(tmp_path):
    run = train(small_config(tmp_path, max_steps=4, display_freq=2, no_html=False, tensorboard=True))
    page = (run / "web" / "index.html").read_text()
    assert page.count("synthesized image") >= 2
    assert (run / "web" / "losses.png").exists()
    assert list((run / "tensorboard").iterdir())


def test_compiled_networks_train(tmp_path, monkeypatch):
    """--compile changes speed, not results; the eager backend keeps the test short."""
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compile_(network, backend="eager"))
    plain = train(small_config(tmp_path / "plain", max_steps=2, r1_gamma=10.0))
    compiled = train(small_config(tmp_path / "compiled", max_steps=2, r1_gamma=10.0, compile=True))
    for one, other in zip(losses(plain), losses(compiled), strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_pix2pixhd_trains(tmp_path):
    model = {"netG": "pix2pixhd", "norm_G": "instance", "resnet_n_downsample": 2}
    train(small_config(tmp_path, max_steps=1, model=model))


@pytest.mark.parametrize("no_instance", [False, True])
def test_rgb_condition_trains_and_generates(tmp_path, no_instance):
    """label_nc 0: photographs to photographs, with and without instance edges."""
    noise = np.random.default_rng(0)
    for folder, mode in (("labels", "RGB"), ("images", "RGB"), ("instances", "L")):
        (tmp_path / folder).mkdir()
        for name in "ab":
            shape = (40, 40, 3) if mode == "RGB" else (40, 40)
            Image.fromarray(noise.integers(0, 255, shape, dtype=np.uint8)).save(tmp_path / folder / f"{name}.png")
    folders = {f"{kind}_dir": str(tmp_path / f"{kind}s") for kind in ("label", "image", "instance")}
    data = {"dataset_mode": "custom", "label_nc": 0, "no_instance": no_instance, "preprocess_mode": "resize_and_crop"}
    run = train(small_config(tmp_path, max_steps=2, data={**data, **folders}))
    images = generate(
        run / "latest.safetensors",
        tmp_path / "labels" / "a.png",
        instance=None if no_instance else tmp_path / "instances" / "a.png",
    )
    assert images[0].size == (40, 40), "the mask's own size"


def test_vgg_loss_from_a_weights_file(tmp_path):
    """The perceptual loss is the L1 distance of five feature maps; zero between an image and itself."""
    torch.manual_seed(0)
    vgg = VGG19Features()
    file = tmp_path / "vgg19.pth"
    torch.save({**vgg.state_dict(), "classifier.0.weight": torch.zeros(1)}, file)
    run = train(small_config(tmp_path, max_steps=1, no_vgg_loss=False, vgg_weights=str(file)))
    assert losses(run)[0]["VGG"] > 0
    features = load_vgg19(str(file))(torch.rand(1, 3, 32, 32))
    assert [tuple(f.shape[1:]) for f in features] == [
        (64, 32, 32),
        (128, 16, 16),
        (256, 8, 8),
        (512, 4, 4),
        (512, 2, 2),
    ]
    assert vgg_loss(features, features) == 0


def test_vgg_features_of_grey_are_those_of_equal_channels():
    vgg, grey = VGG19Features(), torch.rand(1, 1, 32, 32)
    for one, other in zip(vgg(grey), vgg(grey.repeat(1, 3, 1, 1)), strict=True):
        assert torch.equal(one, other)


def test_pix2pixhd_in_grey(tmp_path):
    model = {"netG": "pix2pixhd", "norm_G": "instance", "resnet_n_downsample": 1, "resnet_n_blocks": 1}
    run = train(small_config(tmp_path, max_steps=1, data={"output_nc": 1}, model=model))
    state = checkpoint.load(run / "latest.safetensors")
    assert [len(weight) for name, weight in state["G"].items() if name.endswith("weight")][-1] == 1


def test_fp16_scales_its_gradients(tmp_path):
    run = train(small_config(tmp_path, max_steps=2, precision="fp16", r1_gamma=10.0))
    state = checkpoint.load(run / "latest.safetensors")
    assert state["scaler_G"]["scale"] > 1
    assert all(np.isfinite(list(line.values())).all() for line in losses(run))
