"""Converting checkpoints: both ways, what is inferred, and what is refused."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command import TINY, assert_refused
from PIL import Image
from test_train import small_config

import spade_model
from spade_model import checkpoint, checkpoint_layouts, conversion
from spade_model.checkpoint_layouts import LAYOUTS, CheckpointLayout, Keys
from spade_model.config import DataConfig, ModelConfig, load_config
from spade_model.errors import UserError
from spade_model.networks import ConvEncoder, MultiscaleDiscriminator, Pix2PixHDGenerator, SPADEGenerator

State = dict[str, torch.Tensor]


def stand_in(semantic_nc: int = 13, ngf: int = 2, hidden: int = 128) -> State:
    """A generator's state dict in the original's layout, from its public names and shapes; 64 pixels, spectral norm."""
    state = {"fc.weight": torch.randn(16 * ngf, semantic_nc, 3, 3), "fc.bias": torch.randn(16 * ngf)}
    widths = {"head_0": (16, 16), "G_middle_0": (16, 16), "G_middle_1": (16, 16)}
    widths |= {"up_0": (16, 8), "up_1": (8, 4), "up_2": (4, 2), "up_3": (2, 1)}
    for block, (fin, fout) in widths.items():
        fin, fout = fin * ngf, fout * ngf
        convolutions = {"conv_0": (fout, fin, 3), "conv_1": (fout, fout, 3)}
        norms = {"norm_0": fin, "norm_1": fout}
        if fin != fout:
            convolutions["conv_s"], norms["norm_s"] = (fout, fin, 1), fin
        for name, (out, channels, side) in convolutions.items():
            weight = torch.randn(out, channels, side, side)
            left, _, right = torch.linalg.svd(weight.flatten(1), full_matrices=False)
            state |= {f"{block}.{name}.weight_orig": weight, f"{block}.{name}.weight_u": left[:, 0].clone()}
            state[f"{block}.{name}.weight_v"] = right[0].clone()
            if name != "conv_s":
                state[f"{block}.{name}.bias"] = torch.randn(out)
        for name, channels in norms.items():
            norm = f"{block}.{name}"
            state[f"{norm}.param_free_norm.running_mean"] = torch.randn(channels)
            state[f"{norm}.param_free_norm.running_var"] = torch.rand(channels) + 0.5
            state[f"{norm}.param_free_norm.num_batches_tracked"] = torch.tensor(7)
            for part, shape in {
                "mlp_shared.0": (hidden, semantic_nc),
                "mlp_gamma": (channels, hidden),
                "mlp_beta": (channels, hidden),
            }.items():
                state[f"{norm}.{part}.weight"] = torch.randn(*shape, 3, 3) / 30
                state[f"{norm}.{part}.bias"] = torch.randn(shape[0])
    return state | {"conv_img.weight": torch.randn(3, ngf, 3, 3), "conv_img.bias": torch.randn(3)}


def assert_equal(one: State, other: State) -> None:
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []
    assert [name for name in one if one[name].dtype != other[name].dtype] == []


def read(path: Path) -> State:
    return torch.load(path, weights_only=True)


@pytest.fixture(scope="module")
def vae_file(tmp_path_factory) -> Path:
    """A checkpoint of `spade train` that the original's layout has a place for: generator, average, D and E."""
    config = small_config(
        tmp_path_factory.mktemp("run"),
        max_steps=1,
        ema_decay=0.5,
        data={"crop_size": 256, "max_dataset_size": 2},
        model={"use_vae": True, "z_dim": 256, "ngf": 1, "num_D": 3, "n_layers_D": 2, "norm_D": "spectralsyncbatch"},
    )
    return spade_model.train(config) / "latest.safetensors"


@pytest.mark.parametrize("layout", ["nvlabs", "parametrized"])
@pytest.mark.parametrize("last", [False, True])
def test_round_trip_is_bitwise(spade, vae_file, tmp_path, layout, last):
    there = tmp_path / "latest_net_G.pth"
    flags = ["--last_weights"] if last else []
    result = spade("convert", "--checkpoint", vae_file, "--output", there, "--to", layout, *flags)
    assert (result.status, result.err) == (0, "")
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"latest_net_{n}.pth" for n in "DEG"]
    result = spade("convert", "--checkpoint", there, "--output", tmp_path / "back.safetensors", "--dataset_mode", "toy")
    assert (result.status, result.err) == (0, "")
    before, after = checkpoint.load(vae_file), checkpoint.load(tmp_path / "back.safetensors")
    assert_equal(after["G"], before["G" if last else "G_ema"])
    assert_equal(after["E"], before["E"])
    assert_equal(after["D"], before["D"])
    data, model = (spade_model.config.config_from_dict(t["config"], "").model for t in (before, after))
    assert replace(model, num_upsampling_layers=data.num_upsampling_layers) == data


def test_images_stay(vae_file, tmp_path):
    source = conversion.read_source(vae_file)
    assert source.config is not None
    there = tmp_path / "latest_net_G.pth"
    conversion.convert(source, there, source.config.data, source.config.model)
    source = conversion.read_source(there)
    conversion.convert(source, tmp_path / "back.safetensors", DataConfig(dataset_mode="toy", label_nc=7), ModelConfig())
    models = [spade_model.load_model(path, device="cpu") for path in (vae_file, tmp_path / "back.safetensors")]
    segmap, z = torch.randint(0, 7, (1, 64, 64)), torch.randn(1, 256)
    first, second = (model(torch.nn.functional.one_hot(segmap, 8).permute(0, 3, 1, 2).float(), z) for model in models)
    assert first.std() > 0
    assert torch.equal(first, second)


def test_names_with_parametrizations(vae_file, tmp_path):
    source = conversion.read_source(vae_file)
    assert source.config is not None
    conversion.convert(source, tmp_path / "a_net_G.pth", source.config.data, source.config.model, to="parametrized")
    written = read(tmp_path / "a_net_G.pth")
    layer = torch.nn.utils.parametrizations.spectral_norm(torch.nn.Conv2d(16, 16, 3, padding=1))
    ours = SPADEGenerator(8, ngf=1, use_vae=True, crop_size=256)
    assert source.average is not None
    ours.load_state_dict(source.average)
    layer.load_state_dict({k.removeprefix("head_0.conv_0."): v for k, v in written.items() if "head_0.conv_0." in k})
    x = torch.randn(1, 16, 4, 4)
    torch.testing.assert_close(layer.eval()(x), ours.head_0.conv_0.eval()(x))


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_file_of_the_original_generates_at_once(spade, tmp_path, prefix):
    """The edge plane and the classes are told apart by the options; `--label_nc` alone leaves one channel for edges."""
    state = stand_in()
    torch.save({prefix + name: tensor for name, tensor in state.items()}, tmp_path / "latest_net_G.pth")
    out = tmp_path / "new" / "mine.safetensors"
    options = ["--label_nc", "12", "--crop_size", "64"]
    result = spade("convert", "--checkpoint", tmp_path / "latest_net_G.pth", "--output", out, *options)
    assert (result.status, result.err) == (0, "")
    assert (
        "ngf 2, spectralspadesyncbatch3x3, normal upsampling, 13 condition channels (label_nc 12, instance"
        in result.out
    )
    assert "--num_upsampling_layers normal" in result.out
    assert_equal(checkpoint.load(out)["G"], state)
    config = load_config(out.with_suffix(".json"))
    assert (config.data.label_nc, config.data.no_instance, config.data.crop_size) == (12, False, 64)
    assert config == spade_model.config.config_from_dict(checkpoint.load(out)["config"], "")
    Image.new("L", (64, 64)).save(tmp_path / "mask.png")
    masks = ["--label", tmp_path / "mask.png", "--instance", tmp_path / "mask.png"]
    made = spade("generate", "--checkpoint", out, *masks, "--results_dir", tmp_path / "results", "--device", "cpu")
    assert (made.status, made.err) == (0, "")
    assert len(list((tmp_path / "results").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    ("channels", "dataset_mode", "label_nc", "no_instance"),
    [(184, "coco", 182, False), (151, "ade20k", 150, True), (36, "cityscapes", 35, False), (21, "custom", 20, False)],
)
def test_condition_channels_tell_the_data_set(spade, tmp_path, channels, dataset_mode, label_nc, no_instance):
    torch.save(stand_in(channels, ngf=1), tmp_path / "latest_net_G.pth")
    arguments = ["--checkpoint", tmp_path / "latest_net_G.pth", "--output", tmp_path / "a.safetensors"]
    assert spade("convert", *arguments).status == 0
    data = load_config(tmp_path / "a.json").data
    assert (data.dataset_mode, data.label_nc, data.no_instance) == (dataset_mode, label_nc, no_instance)
    assert data.semantic_nc == channels


def test_old_files_are_completed(tmp_path):
    """Spectral norm's second vector and batch norm's counters, which old versions of PyTorch did not save."""
    state = stand_in()
    old = {k: v for k, v in state.items() if not k.endswith(("weight_v", "num_batches_tracked"))}
    torch.save(old, tmp_path / "G.pth")
    source = conversion.read_source(tmp_path / "G.pth")
    conversion.convert(source, tmp_path / "new.pth", DataConfig(label_nc=12), ModelConfig(), to="nvlabs")
    new = read(tmp_path / "new.pth")
    assert new.keys() == state.keys()
    for name in [name for name in new if name.endswith("weight_v")]:
        torch.testing.assert_close(new[name].abs(), state[name].abs(), rtol=0, atol=1e-4)


JOINT = CheckpointLayout(
    "a layout with one convolution for gamma and beta",
    keys=(Keys("*.first_norm.*", ("*.param_free_norm.*",)), Keys("*.mlp_both.*", ("*.mlp_gamma.*", "*.mlp_beta.*"))),
    marker=r"\.mlp_both\.",
)


def test_joint_and_renamed_tensors(tmp_path, monkeypatch):
    monkeypatch.setitem(LAYOUTS, "joint", JOINT)
    state = stand_in()
    there = checkpoint_layouts.from_ours(state, JOINT)
    assert not any("param_free_norm" in name or "mlp_gamma" in name or "mlp_beta" in name for name in there)
    norm = "up_1.norm_s"
    both = torch.cat([state[f"{norm}.mlp_gamma.weight"], state[f"{norm}.mlp_beta.weight"]])
    assert torch.equal(there[f"{norm}.mlp_both.weight"], both)
    assert torch.equal(there[f"{norm}.first_norm.running_var"], state[f"{norm}.param_free_norm.running_var"])
    torch.save(there, tmp_path / "G.pth")
    assert_equal(checkpoint_layouts.read(tmp_path / "G.pth"), state)
    torch.save(there | {f"{norm}.mlp_both.bias": torch.zeros(9)}, tmp_path / "G.pth")
    with pytest.raises(UserError, match=r"up_1\.norm_s\.mlp_both\.bias has shape \(9,\).* into 2 equal parts"):
        checkpoint_layouts.read(tmp_path / "G.pth")
    torch.save(there | {f"{norm}.mlp_beta.bias": torch.zeros(9)}, tmp_path / "G.pth")
    with pytest.raises(UserError, match=r"holds up_1\.norm_s\.mlp_beta\.bias twice"):
        checkpoint_layouts.read(tmp_path / "G.pth")


class _WritesFile:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def changed(**changes: object) -> State:
    return {k: v for k, v in {**stand_in(), **changes}.items() if v is not None}  # type: ignore[misc]


def without(start: str) -> State:
    return {k: v for k, v in stand_in().items() if not k.startswith(start)}


BAD: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "list": (lambda p: [1, 2], ["does not hold a state dict"]),
    "empty": (lambda p: {}, ["does not hold a state dict"]),
    "nested": (lambda p: {"net": stand_in(), "epoch": 3}, ["does not hold a state dict"]),
    "code": (lambda p: {"a": _WritesFile(p / "canary")}, ["was refused", "run code"]),
    "both prefixes": (
        lambda p: stand_in() | {"module.fc.weight": torch.zeros(1)},
        ["two networks", "with and without the prefix module."],
    ),
    "missing keys": (
        lambda p: without("up_1"),
        ["generator of", "another architecture: up_1.", "is missing; up_1.", "and 32 more"],
    ),
    "unexpected keys": (lambda p: changed(extra=torch.zeros(1)), ["another architecture: extra is not expected."]),
    "no architecture": (
        lambda p: changed(**{"up_0.conv_0.bias": torch.zeros(3)}),
        ["up_0.conv_0.bias has shape (3,), the network (16,)"],
    ),
    "integer weights": (
        lambda p: changed(**{"fc.bias": torch.zeros(32, dtype=torch.int64)}),
        ["fc.bias has dtype torch.int64, the network torch.float32"],
    ),
    "no channels": (
        lambda p: changed(**{"conv_img.weight": torch.zeros(3, 0, 3, 3)}),
        ["not hold a SPADE generator", "(3, 0, 3, 3)"],
    ),
    "huge shape of few bytes": (
        lambda p: changed(**{"conv_img.weight": torch.zeros(1).expand(3, 1 << 20, 3, 3)}),
        ["another architecture", " more. Use the options"],
    ),
    "vector of another length": (
        lambda p: changed(**{"up_0.conv_0.weight_u": torch.zeros(3), "up_0.conv_0.weight_v": None}),
        ["up_0.conv_0.weight_v is missing; up_0.conv_0.weight_u has shape (3,)"],
    ),
    "discriminator": (
        lambda p: MultiscaleDiscriminator(8, ndf=2).state_dict(),
        ["not hold a SPADE generator", "discriminator's weights", "_net_G.pth"],
    ),
    "encoder": (lambda p: ConvEncoder(ngf=2).state_dict(), ["encoder's weights"]),
    "pix2pixhd": (lambda p: Pix2PixHDGenerator(8, ngf=2).state_dict(), ["pix2pixHD generator's weights"]),
    "other hidden width": (
        lambda p: stand_in(ngf=2, hidden=4),
        ["4 hidden channels, those of this project 128", "gan-compression"],
    ),
    "oasis": (
        lambda p: {
            "body.0.conv_0.weight_orig": torch.zeros(1),
            "body.0.norm_0.first_norm.running_mean": torch.zeros(1),
        },
        ["its layout is oasis", "6 residual blocks", "64 noise channels", "accelerate"],
    ),
    "oasis, discriminator": (lambda p: {"body_up.0.conv1.0.bias": torch.zeros(1)}, ["layout is oasis", "U-Net"]),
    "imaginaire": (
        lambda p: {"net_G": {"module.spade_generator.head_0.layers.conv.bias": torch.zeros(1)}, "current_epoch": 3},
        ["its layout is imaginaire", "5 x 5 output convolutions"],
    ),
    "clade": (
        lambda p: changed(**{"up_0.norm_0.class_specified_affine.weight": torch.zeros(1)}),
        ["its layout is clade", "one row per class", "SPADE mode can be converted"],
    ),
    "sean": (lambda p: changed(**{"up_0.norm_0.blending_gamma": torch.zeros(1)}), ["its layout is sean"]),
    "mobile": (
        lambda p: changed(**{"up_0.norm_0.mlp_gamma.conv.0.weight": torch.zeros(1)}),
        ["its layout is mobile", "separable convolutions"],
    ),
}


def files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_refused(spade, tmp_path, name):
    make, fragments = BAD[name]
    torch.save(make(tmp_path), tmp_path / "latest_net_G.pth")
    arguments = ["--checkpoint", tmp_path / "latest_net_G.pth", "--output", tmp_path / "out" / "a.safetensors"]
    assert_refused(spade("convert", *arguments, "--label_nc", "12", "--crop_size", "64"), *fragments)
    assert files(tmp_path) == ["latest_net_G.pth"]


@pytest.mark.parametrize("part", ["G", "G_ema", "D"])
@pytest.mark.parametrize("content", [5, {}, {"fc.weight": 3}])
def test_checkpoints_without_state_dicts_are_refused(spade, trained_run, tmp_path, part, content):
    file = tmp_path / "a.safetensors"
    checkpoint.save(file, {**checkpoint.load_part(trained_run / "latest.safetensors", "G", "config"), part: content})
    assert_refused(
        spade("convert", "--checkpoint", file, "--output", tmp_path / "a_net_G.pth"), "not hold a state dict"
    )
    if part != "D":
        made = spade("generate", "--checkpoint", file, "--results_dir", tmp_path / "results", "--device", "cpu")
        assert_refused(made, "not hold a state dict")
    assert files(tmp_path) == ["a.safetensors"]


def test_an_encoder_without_use_is_left_out(spade, tmp_path):
    torch.save(stand_in(), tmp_path / "latest_net_G.pth")
    (tmp_path / "latest_net_E.pth").write_text("hello")
    arguments = ["convert", "--checkpoint", tmp_path / "latest_net_G.pth", "--output", tmp_path / "a.safetensors"]
    assert spade(*arguments).status == 0
    assert sorted(checkpoint.load(tmp_path / "a.safetensors")) == ["G", "config"]
    spade_model.load_model(tmp_path / "latest_net_G.pth", DataConfig(label_nc=12, crop_size=64), device="cpu")


def test_damaged_neighbours_are_refused(spade, tmp_path):
    torch.save(stand_in(), tmp_path / "latest_net_G.pth")
    arguments = ["convert", "--checkpoint", tmp_path / "latest_net_G.pth", "--output", tmp_path / "a.safetensors"]
    (tmp_path / "latest_net_D.pth").write_text("hello")
    assert_refused(spade(*arguments), "latest_net_D.pth")
    torch.save(MultiscaleDiscriminator(9, ndf=2).state_dict(), tmp_path / "latest_net_D.pth")
    result = spade(*arguments)
    assert_refused(result, "the discriminator of", "discriminator_0.model0.0.weight has shape (2, 12, 4, 4)")
    assert files(tmp_path) == ["latest_net_D.pth", "latest_net_G.pth"]


def test_bad_arguments_are_refused(spade, trained_run, tmp_path):
    torch.save(stand_in(), tmp_path / "G.pth")
    ours, theirs = ["--checkpoint", trained_run / "latest.safetensors"], ["--checkpoint", tmp_path / "G.pth"]
    out = tmp_path / "out"
    new, old = ["--output", out / "a.safetensors"], ["--output", out / "a_net_G.pth"]
    for arguments, fragments in (
        (new, ["needs --checkpoint, the file to read"]),
        (theirs, ["needs --output, the file to write"]),
        (["--checkpoint", tmp_path / "nowhere.pth", *new], ["no such file", "nowhere.pth"]),
        (["--checkpoint", tmp_path / "nowhere.safetensors", *old], ["no such file", "nowhere.safetensors"]),
        ([*theirs, *new, "--from", "nvidia"], ["'nvidia' is not a checkpoint layout; there are spade, oasis,"]),
        ([*theirs, *new, "--to", "nvidia"], ["'nvidia' is not a checkpoint layout"]),
        ([*theirs, *new, "--from", "oasis"], ["its layout is oasis"]),
        ([*theirs, *new, "--from", "spade"], ["not a safetensors file"]),
        ([*theirs, *new, "--to", "imaginaire"], ["cannot be converted", "5 x 5 output convolutions"]),
        ([*theirs, *old, "--to", "spade"], ["ends in .safetensors"]),
        ([*theirs, *new, "--to", "parametrized"], ["PyTorch files", "latest_net_G.pth"]),
        ([*theirs, *new, "--label_nc", "30"], ["13 condition channels", "--label_nc 30 cannot give that"]),
        ([*ours, *new, "--to", "spade"], ["has the layout spade already"]),
        ([*ours, "--output", out / "a.pth"], ["its name needs _net_G", "discriminator go into files of their own"]),
        ([*ours, *old, "--ngf", "3", "--label_nc", "9"], ["8 condition channels"]),
    ):
        assert_refused(spade("convert", *arguments), *fragments)
    assert files(tmp_path) == ["G.pth"]


@pytest.mark.parametrize(
    ("options", "fragments"),
    [
        (["--output_nc", "1"], ["layout nvlabs", "3 channels, those of this model 1"]),
        (["--use_vae", "--z_dim", "5"], ["style vectors of length 256, that of this model 5"]),
        (["--use_vae"], ["at least 256 pixels, this model was trained with 32"]),
        (
            ["--netG", "pix2pixhd", "--resnet_n_blocks", "1", "--resnet_n_downsample", "1"],
            ["only those of --netG spade"],
        ),
    ],
)
def test_models_that_the_layout_has_no_place_for(spade, tmp_path, options, fragments):
    run = ["--checkpoints_dir", tmp_path / "runs", "--name", "run", "--max_steps", "1"]
    assert spade("train", *TINY, *run, *options).status == 0
    file = tmp_path / "runs" / "run" / "latest.safetensors"
    assert_refused(spade("convert", "--checkpoint", file, "--output", tmp_path / "out/a_net_G.pth"), *fragments)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten_unasked(spade, trained_run, tmp_path):
    arguments = ["convert", "--checkpoint", trained_run / "latest.safetensors", "--output", tmp_path / "a_net_G.pth"]
    (tmp_path / "a_net_D.pth").write_text("mine")
    assert_refused(spade(*arguments), "a_net_D.pth would be overwritten", "--overwrite")
    assert files(tmp_path) == ["a_net_D.pth"]
    assert spade(*arguments, "--overwrite").status == 0
    assert files(tmp_path) == ["a_net_D.pth", "a_net_G.pth"]
    back = ["convert", "--checkpoint", tmp_path / "a_net_G.pth", "--output", tmp_path / "b.safetensors"]
    (tmp_path / "b.json").write_text("mine")
    assert_refused(spade(*back), "b.json would be overwritten")
    assert (tmp_path / "b.json").read_text() == "mine"
    assert spade(*back, "--overwrite").status == 0
    assert json.loads((tmp_path / "b.json").read_text())["data"]["dataset_mode"] == "toy"


def test_a_full_disk_changes_no_file(spade, trained_run, tmp_path, monkeypatch):
    """The second of two files cannot be written: the first one is not replaced either."""
    arguments = ["convert", "--checkpoint", trained_run / "latest.safetensors", "--output", tmp_path / "a_net_G.pth"]
    for name in "GD":
        (tmp_path / f"a_net_{name}.pth").write_text("mine")
    save, calls = torch.save, []

    def fail_later(content: object, path: Path) -> None:
        calls.append(path)
        if len(calls) > 1:
            raise OSError(28, "No space left on device")
        save(content, path)

    monkeypatch.setattr(torch, "save", fail_later)
    assert_refused(spade(*arguments, "--overwrite"), "could not write", "No space left on device", "--output")
    assert files(tmp_path) == ["a_net_D.pth", "a_net_G.pth"]
    assert [(tmp_path / f"a_net_{name}.pth").read_text() for name in "GD"] == ["mine", "mine"]
