"""Bad tensors and bad options: one message with the value, the place and the fix."""

from __future__ import annotations

import ast
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from command import TINY, assert_refused

import spade_kernels
import spade_model
from spade_kernels import SPADE, LabelMap
from spade_model.config import DataConfig, ModelConfig, TrainConfig
from spade_model.errors import UserError
from spade_model.networks import (
    ConvEncoder,
    MultiscaleDiscriminator,
    Pix2PixHDGenerator,
    SPADEGenerator,
    build_generator,
    initialize,
)
from spade_model.training import choose_device, train

LABELS = torch.zeros(2, 8, 8, dtype=torch.int64)
IMAGES = torch.zeros(2, 3, 8, 8)
X = torch.zeros(2, 4, 8, 8)


def labels_with(value: int) -> torch.Tensor:
    """One pixel, image 1, x=3, y=2, has the value."""
    labels = LABELS.clone()
    labels[1, 2, 3] = value
    return labels


def layer(x: torch.Tensor = X, segmap=LABELS, norm: str = "batch") -> torch.Tensor:
    return SPADE(f"spade{norm}3x3", 4, 3)(x, segmap)


def layer_with(changes: Callable[[SPADE], object], training: bool = True, **options) -> torch.Tensor:
    """A call of a layer after something was done to it."""
    changed = SPADE("spadebatch3x3", 4, 3).train(training)
    changes(changed)
    return changed(X, LABELS, **options)


def set_statistic(name: str, size: int) -> Callable[[SPADE], None]:
    return lambda layer: setattr(layer.param_free_norm, name, torch.zeros(size))


def set_bias(name: str, size: int) -> Callable[[SPADE], None]:
    return lambda layer: setattr(layer.get_submodule(name), "bias", torch.nn.Parameter(torch.zeros(size)))


MAP = LabelMap(LABELS, 3)


def generate(segmap, z: torch.Tensor | None = None, **options) -> torch.Tensor:
    return SPADEGenerator(3, **{"ngf": 2, "crop_size": 64, **options})(segmap, z)


def judge(segmap, image) -> object:
    return MultiscaleDiscriminator(3, ndf=2)(segmap, image)


Attempt = Callable[[], object]

BAD_TENSORS: dict[str, tuple[type[Exception], Attempt, list[str]]] = {
    "label too large": (
        ValueError,
        lambda: LabelMap(labels_with(7), 3),
        ["label 7", "image 1", "x=3, y=2", "0..2", "1 such", "num_labels"],
    ),
    "label negative": (ValueError, lambda: LabelMap(labels_with(-1), 3), ["label -1", "image 1", "x=3, y=2", "0..2"]),
    "float labels": (TypeError, lambda: LabelMap(LABELS.float(), 3), ["integer", "torch.float32", "from_one_hot"]),
    "bool labels": (TypeError, lambda: LabelMap(LABELS.bool(), 3), ["integer", "torch.bool"]),
    "array for labels": (TypeError, lambda: LabelMap(LABELS.numpy(), 3), ["integer tensor", "ndarray"]),
    "labels without batch": (ValueError, lambda: LabelMap(LABELS[0], 3), ["(N, H, W)", "(8, 8)"]),
    "one-hot integers": (
        ValueError,
        lambda: LabelMap(torch.zeros(2, 3, 8, 8).long(), 3),
        ["(2, 3, 8, 8)", "from_one_hot"],
    ),
    "empty batch of labels": (ValueError, lambda: LabelMap(LABELS[:0], 3), ["empty", "(0, 8, 8)"]),
    "no classes": (ValueError, lambda: LabelMap(LABELS, 0), ["num_labels", "at least 1", "0"]),
    "too many classes": (ValueError, lambda: LabelMap(LABELS, 2**31), ["num_labels", "at most", "2147483648"]),
    "float number of classes": (TypeError, lambda: LabelMap(LABELS, 5.0), ["num_labels", "integer", "5.0"]),  # type: ignore[arg-type]
    "float ignore_index": (TypeError, lambda: LabelMap(LABELS, 5, ignore_index=2.0), ["ignore_index", "2.0"]),  # type: ignore[arg-type]
    "windows: size": (TypeError, lambda: MAP.windows((8,), 3, 1, 1), ["pair (h, w)", "(8,)"]),
    "windows: float size": (TypeError, lambda: MAP.windows((8.0, 8), 3, 1, 1), ["height", "integer", "8.0"]),  # type: ignore[arg-type]
    "windows: empty size": (ValueError, lambda: MAP.windows((8, 0), 3, 1, 1), ["width", "at least 1", "0"]),
    "windows: float kernel": (TypeError, lambda: MAP.windows((8, 8), 3.0, 1, 1), ["kernel_size", "3.0"]),  # type: ignore[arg-type]
    "windows: no kernel": (ValueError, lambda: MAP.windows((8, 8), 0, 1, 1), ["kernel_size", "at least 1", "0"]),
    "windows: no stride": (ValueError, lambda: MAP.windows((8, 8), 3, 0, 1), ["stride", "at least 1", "0"]),
    "windows: stride": (ValueError, lambda: MAP.windows((8, 8), 3, -1, 1), ["stride", "at least 1", "-1"]),
    "windows: padding": (ValueError, lambda: MAP.windows((8, 8), 3, 1, -1), ["padding", "at least 0", "-1"]),
    "windows: too large": (ValueError, lambda: MAP.windows((2**20, 2**20), 3, 1, 1), ["2 maps", "2^28 pixels"]),
    "windows: too many ids": (ValueError, lambda: MAP.windows((2**10, 2**10), 99, 1, 49), ["99x99", "2^31 ids"]),
    "window index: float kernel, cached": (
        TypeError,
        lambda: MAP.prepare([(8, 8)]).window_index((8, 8), 3.0),  # type: ignore[arg-type]
        ["kernel_size", "3.0"],
    ),
    "window index: no kernel": (ValueError, lambda: MAP.window_index((8, 8), 0), ["kernel_size", "at least 1"]),
    "window index: kernel": (ValueError, lambda: MAP.window_index((8, 8), -3), ["kernel_size", "at least 1", "-3"]),
    "window index: even kernel": (ValueError, lambda: MAP.window_index((8, 8), 4), ["kernel_size", "odd", "4"]),
    "window index: too large": (ValueError, lambda: MAP.window_index((2**20, 2**20), 3), ["2^28 pixels"]),
    "prepare: size": (ValueError, lambda: MAP.prepare([(8, 8), (-1, 8)]), ["height", "at least 1", "-1"]),
    "codebook_matmul: too few rows": (ValueError, lambda: MAP.codebook_matmul(torch.zeros(2, 5)), ["(3, D)", "(2, 5)"]),
    "codebook_matmul: integers": (
        ValueError,
        lambda: MAP.codebook_matmul(torch.zeros(3, 5, dtype=torch.int64)),
        ["float", "torch.int64"],
    ),
    "edges of another shape": (
        ValueError,
        lambda: LabelMap(LABELS, 3, LABELS[:1].bool()),
        ["edges", "(1, 8, 8)", "(2, 8, 8)"],
    ),
    "integer edges": (TypeError, lambda: LabelMap(LABELS, 3, LABELS), ["boolean", "torch.int64", "instance_edges"]),
    "maps of different classes": (
        ValueError,
        lambda: LabelMap.cat([LabelMap(LABELS, 3), LabelMap(LABELS, 4)]),
        ["num_labels=3", "num_labels=4", "one batch"],
    ),
    "not one-hot": (
        ValueError,
        lambda: LabelMap.from_one_hot(torch.ones(1, 3, 4, 4)),
        ["not one-hot", "image 0", "x=0, y=0"],
    ),
    "layer: segmap channels": (ValueError, lambda: layer(segmap=torch.zeros(2, 5, 8, 8)), ["5", "built for 3"]),
    "layer: segmap classes": (ValueError, lambda: layer(segmap=LabelMap(LABELS, 5)), ["5", "built for 3"]),
    "layer: segmap rank": (ValueError, lambda: layer(segmap=torch.zeros(3, 8, 8)), ["(N, 3, H, W)", "(3, 8, 8)"]),
    "layer: segmap missing": (TypeError, lambda: layer(segmap=None), ["LabelMap or a tensor", "NoneType"]),
    "layer: segmap batch": (ValueError, lambda: layer(segmap=LABELS[:1]), ["1 images", "x holds 2"]),
    "layer: id too large": (ValueError, lambda: layer(segmap=labels_with(9)), ["label 9", "x=3, y=2", "0..2"]),
    "layer: x rank": (ValueError, lambda: layer(X[0]), ["(N, C, h, w)", "(4, 8, 8)"]),
    "layer: x integer": (ValueError, lambda: layer(X.long()), ["float", "torch.int64"]),
    "layer: x channels": (ValueError, lambda: layer(IMAGES), ["3 channels", "built for 4"]),
    "layer: one value, batch norm": (ValueError, lambda: layer(X[:1, :, :1, :1], LABELS[:1]), ["(1, 4, 1, 1)"]),
    "layer: one pixel, instance norm": (
        ValueError,
        lambda: layer(X[..., :1, :1], norm="instance"),
        ["more than one pixel", "(2, 4, 1, 1)"],
    ),
    "layer: unknown norm": (ValueError, lambda: layer(norm="group"), ["'group'", "instance, batch, syncbatch"]),
    "layer: even kernel": (ValueError, lambda: SPADE("spadebatch4x4", 4, 3), ["odd", "4"]),
    **{
        f"layer: bias of {name}": (ValueError, partial(layer_with, set_bias(module, 5)), [f"bias of {name}", "(5,)"])
        for name, module in (("shared", "mlp_shared.0"), ("gamma", "mlp_gamma"), ("beta", "mlp_beta"))
    },
    **{
        f"layer: {name}, {mode}, {size} values": (
            ValueError,
            partial(layer_with, set_statistic(name, size), mode == "training"),
            [name, f"({size},)", "4 channels"],
        )
        for name in ("running_mean", "running_var")
        for mode in ("training", "evaluation")
        for size in (0, 1, 5)
    },
    "layer: moments of other channels": (
        ValueError,
        lambda: layer_with(lambda layer: None, moments=(torch.zeros(2, 5), torch.ones(2, 5))),
        ["moments", "(2, 4)", "(2, 5)"],
    ),
    "layer: one moment": (
        ValueError,
        lambda: layer_with(lambda layer: None, moments=(torch.zeros(2, 4),)),
        ["moments", "two float tensors"],
    ),
    "layer: integer moments": (
        ValueError,
        lambda: layer_with(lambda layer: None, moments=(torch.zeros(2, 4).long(),) * 2),
        ["two float tensors", "torch.int64"],
    ),
    "layer: moments elsewhere": (
        ValueError,
        lambda: layer_with(lambda layer: None, moments=(torch.zeros(2, 4, device="meta"),) * 2),
        ["two float tensors", "on meta"],
    ),
    "layer: one running statistic": (
        ValueError,
        lambda: layer_with(lambda layer: setattr(layer.param_free_norm, "running_var", None), False),
        ["one of running_mean and running_var"],
    ),
    "layer: upsample": (ValueError, lambda: layer_with(lambda layer: None, upsample=3), ["1 or 2", "3"]),
    "layer: moments of other images": (
        ValueError,
        lambda: layer_with(lambda layer: None, moments=(torch.zeros(1, 4), torch.ones(1, 4))),
        ["moments", "(2, 4)", "(1, 4)"],
    ),
    "generator: id too large": (ValueError, lambda: generate(labels_with(9)), ["label 9", "x=3, y=2", "0..2"]),
    "generator: segmap channels": (ValueError, lambda: generate(torch.zeros(2, 5, 8, 8)), ["5", "built for 3"]),
    "generator: z shape": (
        ValueError,
        lambda: generate(LABELS, torch.zeros(2, 5), use_vae=True, z_dim=4),
        ["(2, 4)", "(2, 5)"],
    ),
    "generator: z integer": (
        ValueError,
        lambda: generate(LABELS, torch.zeros(2, 4, dtype=torch.int64), use_vae=True, z_dim=4),
        ["float", "torch.int64"],
    ),
    "generator: crop_size": (UserError, lambda: generate(LABELS, crop_size=16), ["crop_size 16", "at least 32"]),
    "generator: layers": (
        UserError,
        lambda: generate(LABELS, num_upsampling_layers="many"),
        ["'many'", "normal"],
    ),
    "generator: one pixel and one image": (
        ValueError,
        lambda: generate(LABELS[:1], crop_size=32),
        ["more than one value", "(1, 32, 1, 1)"],
    ),
    "pix2pixhd: tiny mask": (
        UserError,
        lambda: Pix2PixHDGenerator(3, ngf=2, norm_G="instance", resnet_n_blocks=1)(LABELS),
        ["8x8 pixels", "at least 17"],
    ),
    "discriminator: id too large": (ValueError, lambda: judge(labels_with(9), IMAGES), ["label 9", "x=3, y=2"]),
    "discriminator: sizes": (ValueError, lambda: judge(LABELS, torch.zeros(2, 3, 8, 16)), ["(8, 8)", "(8, 16)"]),
    "discriminator: image channels": (ValueError, lambda: judge(LABELS, X), ["(N, 3, H, W)", "(2, 4, 8, 8)"]),
    "discriminator: image rank": (ValueError, lambda: judge(LABELS, IMAGES[0]), ["(N, 3, H, W)", "(3, 8, 8)"]),
    "discriminator: image integer": (ValueError, lambda: judge(LABELS, IMAGES.byte()), ["float", "torch.uint8"]),
    "discriminator: batch": (
        ValueError,
        lambda: judge(LABELS, IMAGES[:1]),
        ["1 images", "not a multiple of the 2 masks"],
    ),
    "encoder: channels": (ValueError, lambda: ConvEncoder(ngf=2, z_dim=4)(X), ["(N, 3, H, W)", "(2, 4, 8, 8)"]),
    "norm": (UserError, lambda: MultiscaleDiscriminator(3, norm_D="layer"), ["'layer'", "instance, batch"]),
    "init_type": (UserError, lambda: initialize(torch.nn.Linear(1, 1), "lecun"), ["'lecun'", "xavier"]),
    "device": (UserError, lambda: choose_device("fpga"), ["'fpga'", "auto, cpu, cuda"]),
    "dataset_mode in Python": (
        UserError,
        lambda: train(TrainConfig(data=DataConfig(dataset_mode="voc"))),
        ["--dataset_mode 'voc'", "coco, ade20k"],
    ),
    "kernel size in Python": (
        ValueError,
        lambda: build_generator(DataConfig(), ModelConfig(ngf=2, norm_G="spadebatch2x2")),
        ["'spadebatch2x2'", "odd"],
    ),
}


@pytest.mark.parametrize("name", BAD_TENSORS)
def test_library_names_what_does_not_fit(name):
    kind, attempt, fragments = BAD_TENSORS[name]
    with pytest.raises(kind) as raised:
        attempt()
    assert [f for f in fragments if f not in str(raised.value)] == [], str(raised.value)


BAD_OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "misspelt option": (["--nitr", "3"], ["--nitr", "Perhaps you meant", "--niter"]),
    "unknown option": (["--zebra"], ["Unrecognized options: --zebra", "--help"]),
    "stray word": (["zebra"], ["zebra", "--help"]),
    "gone: gpu_ids": (["--gpu_ids", "0"], ["--gpu_ids", "--device cpu|cuda", "torchrun"]),
    "gone: netD, with a value joined": (["--netD=multiscale"], ["--netD", "one discriminator"]),
    "no value": (["--niter"], ["Missing value", "--niter"]),
    "no value, name": (["--name"], ["Missing value", "--name"]),
    "no value, config": (["--config"], ["--config needs a file", "config.json"]),
    "not a number": (["--niter", "ten"], ["--niter", "'ten'"]),
    "not a choice": (["--gan_mode", "wgan"], ["'wgan'", "--gan_mode", "hinge"]),
    "dataset_mode": (["--dataset_mode", "voc"], ["--dataset_mode 'voc'", "coco, ade20k, cityscapes"]),
    "name with a folder": (["--name", "../x"], ["--name '../x'", "plain folder name", "--checkpoints_dir"]),
    "name is the parent": (["--name", ".."], ["--name '..'", "plain folder name"]),
    "lr negative": (["--lr", "-1"], ["--lr -1.0", "greater than 0"]),
    "lr infinite": (["--lr", "inf"], ["--lr inf", "finite"]),
    "weight not a number": (["--lambda_feat", "nan"], ["--lambda_feat nan", "at least 0"]),
    "beta": (["--beta2", "1"], ["--beta2 1.0", "0 <= beta2 < 1"]),
    "no epochs": (["--niter", "0"], ["--niter", "--niter_decay", "no epoch"]),
    "negative freq": (["--print_freq", "0"], ["--print_freq 0", "at least 1"]),
    "ngf": (["--ngf", "0"], ["--ngf 0", "at least 1"]),
    "init_variance": (["--init_variance", "-1"], ["--init_variance -1.0", "at least 0"]),
    "batch_size": (["--batch_size", "0"], ["--batch_size 0", "at least 1"]),
    "batch larger than the data": (["--batchSize", "9"], ["4 images", "9 images", "--batch_size"]),
    "accumulate": (["--accumulate", "3"], ["--accumulate 3", "2 batches"]),
    "norm_G": (["--norm_G", "spadegroup3x3"], ["--norm_G 'spadegroup3x3'", "'group'", "syncbatch"]),
    "norm_G without spade": (["--norm_G", "instance"], ["--norm_G 'instance'", "spade<norm><k>x<k>"]),
    "even kernel": (["--norm_G", "spadebatch2x2"], ["--norm_G 'spadebatch2x2'", "odd", "2"]),
    "norm_D": (["--norm_D", "spectralgroup"], ["--norm_D 'spectralgroup'", "'group'", "syncbatch"]),
    "norm_E": (["--use_vae", "--norm_E", "layer"], ["--norm_E 'layer'", "instance"]),
    "crop too small": (
        ["--num_upsampling_layers", "more"],
        ["--crop_size 32", "--num_upsampling_layers more", "64 pixels"],
    ),
    "crop between multiples": (["--crop_size", "48"], ["48x48", "makes 32x32", "multiples of 32"]),
    "aspect ratio": (["--aspect_ratio", "0"], ["--aspect_ratio 0.0"]),
    "one value per channel": (
        ["--batch_size", "1"],
        ["one pixel", "--crop_size 32", "spectralspadesyncbatch3x3", "--batch_size"],
    ),
    "ngf that cannot halve": (
        ["--crop_size", "128", "--num_upsampling_layers", "most", "--ngf", "1"],
        ["--ngf 1", "--num_upsampling_layers most"],
    ),
    "too many scales": (["--num_D", "7"], ["--num_D 7", "32x32", "--norm_D spectralinstance"]),
    "pix2pixhd size": (["--netG", "pix2pixhd", "--crop_size", "40"], ["40x40", "--resnet_n_downsample 4", "of 16"]),
    "pix2pixhd norm": (["--netG", "pix2pixhd", "--norm_G", "spadebatch3x3"], ["--norm_G 'spadebatch3x3'", "instance"]),
    "pix2pixhd kernel": (["--netG", "pix2pixhd", "--resnet_kernel_size", "4"], ["--resnet_kernel_size 4", "odd"]),
    "pix2pixhd wide kernel": (
        ["--netG", "pix2pixhd", "--resnet_kernel_size", "5"],
        ["_kernel_size 5", "2 pixels"],
    ),
    "device": (["--device", "tpu"], ["--device 'tpu'", "auto, cpu, cuda"]),
    "toy classes": (["--label_nc", "3"], ["--label_nc 3", "7 classes"]),
    "no data": (["--dataset_mode", "coco", "--dataroot", "nowhere"], ["nowhere/train_label", "no such folder"]),
    "no data folders": (["--dataset_mode", "custom"], ["custom", "--label_dir"]),
    "nothing to continue": (["--continue_train"], ["nothing to continue", "--name", "--checkpoints_dir"]),
    "no VGG weights": (
        ["--no_no_vgg_loss", "--vgg_weights", "nowhere.pth"],
        ["nowhere.pth", "--vgg_weights", "--no_vgg_loss"],
    ),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_train_refuses_bad_options_before_it_writes(spade, tmp_path, name):
    options, fragments = BAD_OPTIONS[name]
    result = spade("train", *TINY, "--checkpoints_dir", tmp_path / "runs", *options)
    assert_refused(result, *fragments)
    assert not (tmp_path / "runs").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_without_cuda(spade, tmp_path):
    result = spade("train", *TINY, "--checkpoints_dir", tmp_path, "--device", "cuda")
    assert_refused(result, "--device 'cuda' cannot be used here", "--device cpu")


BAD_COMMANDS: dict[str, tuple[list[str], list[str]]] = {
    "unknown command": (["trian"], ["'trian'", "train, generate, convert, bench, doctor"]),
    "option for a command": (["--lr"], ["'--lr'", "train, generate, convert, bench, doctor"]),
    "doctor: no data": (
        ["doctor", "--dataroot", "nowhere"],
        ["nowhere/train_label: no such folder", "nowhere/val_img: no such folder", "--dataroot", "train: 3 problems"],
    ),
    "doctor: split": (["doctor", "--split", "test"], ["'test'", "--split", "train"]),
    "doctor: dataset_mode": (["doctor", "--dataset_mode", "voc"], ["--dataset_mode 'voc'", "coco"]),
    "generate: no run": (["generate", "--name", "nobody"], ["nobody/latest.safetensors", "--name", "--checkpoint"]),
    "generate: bad name": (["generate", "--name", "../x"], ["--name '../x'", "plain folder name"]),
    "generate: no file": (["generate", "--checkpoint", "nowhere.pth"], ["no such file: nowhere.pth"]),
}


@pytest.mark.parametrize("name", BAD_COMMANDS)
def test_bad_commands(spade, name):
    arguments, fragments = BAD_COMMANDS[name]
    assert_refused(spade(*arguments), *fragments)


def test_half_of_torchruns_environment(spade, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    result = spade("train", *TINY, "--checkpoints_dir", tmp_path)
    assert_refused(result, "WORLD_SIZE is '2'", "torchrun", "unset WORLD_SIZE")


def test_no_file_can_run_code():
    """torch.load only ever reads tensors, and nothing else in the packages unpickles or evaluates."""
    found = []
    for package in (spade_kernels, spade_model):
        for file in Path(package.__file__).parent.rglob("*.py"):
            calls = [node for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
            for call in calls:
                name = ast.unparse(call.func)
                safe = any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords)
                if name in ("pickle.load", "pickle.loads", "eval", "exec") or (name == "torch.load" and not safe):
                    found.append(f"{file}:{call.lineno}: {name}")
    assert found == []
