"""Generates images from masks: `generate()` in Python, `spade generate` on the command line."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from spade_kernels.condition import Segmap
from spade_model import checkpoint
from spade_model.config import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    check_choices,
    check_name,
    config_from_dict,
    contradiction,
    default_data_config,
)
from spade_model.data import Batch, DataError, create_dataset, create_loader, load_condition
from spade_model.data.classes import WrongIds, known_ids
from spade_model.data.images import IMAGE_SUFFIXES, read_photograph, to_photograph
from spade_model.data.item import photograph_to_tensor
from spade_model.errors import UserError
from spade_model.networks import SPADEGenerator, build_encoder, build_generator
from spade_model.networks.check import check_generator
from spade_model.original import complete, infer_generator
from spade_model.pages import PageRow, write_results_page
from spade_model.training import choose_device
from spade_model.visualize import condition_image, overlay, to_image

_OF_THE_MODEL = (
    *("label_nc", "contain_dontcare_label", "no_instance", "ade20k_shift", "output_nc", "image_bits"),
    *(option.name for option in fields(ModelConfig)),
)
"""Options that say what a model is. A checkpoint of this project decides them."""

_OF_THE_STYLE_LAYER = ("crop_size", "aspect_ratio")
"""Options that decide the size of the first layer of a model with a VAE."""

LabelFile = tuple[Path, Path | None]
"""A label image and its instance image."""


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `spade generate`."""

    name: str = "label2coco"
    """The training run whose model is used."""
    checkpoints_dir: str = "./checkpoints"
    """Folder of all runs."""
    which_epoch: str = "latest"
    """Checkpoint of the run: `latest`, or the number of a saved epoch."""
    checkpoint: str = ""
    """Checkpoint file to use instead of a run's: a .safetensors of this project, or the original's *_net_G.pth."""
    last_weights: bool = False
    """Use the last weights even if the checkpoint also holds averaged (EMA) weights."""
    label: str = ""
    """A label image or a folder of them; default: the data set's val split."""
    instance: str = ""
    """The instance image, or folder of instance images with the same names, that goes with --label."""
    style_image: str = ""
    """VAE models: take the style of this photograph."""
    samples: int = 1
    """VAE models: images per mask, each with its own style."""
    results_dir: str = "./results"
    """Folder for images and their page. They go into a new subfolder: <run>/<epoch>, then <run>/<epoch>_2 and so on."""
    how_many: int = 2**31 - 1
    """Stop after this many masks."""
    overlay: bool = False
    """Also write each image with the label colours laid over it."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class LoadedModel:
    """A generator ready for inference, with its encoder and the configs it was trained with.

    `encoder` is None without use_vae, or when the checkpoint holds no encoder.
    """

    generator: nn.Module
    encoder: nn.Module | None
    data: DataConfig
    model: ModelConfig
    device: torch.device

    @torch.no_grad()
    def style(self, image: Image.Image | str | Path) -> tuple[Tensor, Tensor]:
        """Encodes a photograph, given as an image or a file; returns mu and logvar, each (1, z_dim).

        Raises UserError when the model has no encoder, and for bad files and photographs with more bits than
        `data.image_bits`.
        """
        encoder = _require_encoder(self, "a style image")
        kind = self.data.output_nc, self.data.image_bits
        if isinstance(image, Image.Image):
            photograph = to_photograph(image, *kind)
        else:
            photograph = read_photograph(Path(image), *kind)
        return encoder(photograph_to_tensor(photograph).unsqueeze(0).to(self.device))

    @torch.no_grad()
    def __call__(self, segmap: Segmap, z: Tensor | None = None) -> Tensor:
        """Returns images, float32 (N, output_nc, H, W) in [-1, 1], for a condition.

        VAE models take style vectors z (N, z_dim).
        """
        return self.generator(segmap.to(self.device), None if z is None else z.to(self.device)).float()


def generate(
    checkpoint_file: str | Path,
    label: str | Path,
    *,
    instance: str | Path | None = None,
    style_image: str | Path | None = None,
    samples: int = 1,
    seed: int = 0,
    device: str = "auto",
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
) -> list[Image.Image]:
    """Generates images from one label image, in the mode of the training photographs: RGB, L or I;16.

    Args:
        checkpoint_file: a checkpoint of this project, or the original's *_net_G.pth.
        label: the label image. instance: its instance image, for models trained with instances.
        style_image: a photograph that gives the style, for VAE models; without it, styles are drawn from `seed`.
        samples: number of images.
        data, model: configs that replace those of the checkpoint; for the original's files, the options that their
            weights do not determine (dataset mode, crop_size, ...).

    Raises:
        UserError: a file is missing, damaged, of another architecture, or does not fit the model.
    """
    loaded = load_model(checkpoint_file, data, model, device=device)
    with _naming_known_ids(loaded.data):
        batch = load_condition(label, loaded.data, instance)
    bits = loaded.data.image_bits
    return [to_image(image[0], bits) for image in _images(loaded, batch, style_image or "", samples, seed)]


def load_model(
    path: str | Path,
    data: DataConfig | None = None,
    model: ModelConfig | None = None,
    *,
    last_weights: bool = False,
    device: str = "auto",
) -> LoadedModel:
    """Loads the model of a checkpoint of this project or of the original's *_net_G.pth.

    For VAE models of the original, the *_net_E.pth in the same folder is loaded too.

    Args:
        data, model: configs that replace those of the checkpoint, but for options that say what the model is; for the
            original's files, the options that their weights do not determine.
        last_weights: use the last weights even if the checkpoint also holds averaged (EMA) weights.

    Raises:
        UserError: the file is missing, damaged, or of another architecture; `data` or `model` contradicts it; the
            generator cannot make images of the size that `data` says; the device cannot be used.
    """
    path = Path(path)
    where = choose_device(device)
    states: dict[str, dict[str, Tensor]]
    if path.suffix == ".safetensors":
        states = checkpoint.load_part(path, "G", "G_ema", "E", "config")
        saved = saved_config(states, path)
        if "G" not in states:
            raise UserError(f"{path} holds no generator; pass a file that `spade train` wrote")
        data, model = data or saved.data, model or saved.model
        _refuse_contradictions(saved, data, model, path)
        weights = states["G"] if last_weights else states.get("G_ema", states["G"])
    else:
        weights = checkpoint.read_state_dict(path)
        data, model = infer_generator(weights, data or default_data_config("coco"), model or ModelConfig(), str(path))
        beside = path.with_name(path.name.replace("_net_G", "_net_E"))
        states = (
            {"E": checkpoint.read_state_dict(beside)} if model.use_vae and beside != path and beside.exists() else {}
        )
    check_choices(data)
    check_choices(model)
    # A batch of two skips a check for training: in eval mode batch norm accepts one value per channel.
    check_generator(data, model, batch=2)
    generator = build_generator(data, model)
    checkpoint.load_into(generator, complete(weights, generator.state_dict()), str(path))
    encoder = None
    if model.use_vae and "E" in states:
        encoder = build_encoder(data, _encoder_shape(model, states["E"]))
        assert encoder is not None
        checkpoint.load_into(encoder, complete(states["E"], encoder.state_dict()), f"the encoder of {path}")
        encoder = encoder.eval().to(where)
    generator.to(where)
    generator.eval()
    if isinstance(generator, SPADEGenerator):
        generator.freeze()
    return LoadedModel(generator, encoder, data, model, where)


def _refuse_contradictions(saved: TrainConfig, data: DataConfig, model: ModelConfig, path: Path) -> None:
    """Raises UserError for options that contradict those that the checkpoint's model was trained with."""
    given = vars(data) | vars(model)
    for name, trained in (vars(saved.data) | vars(saved.model)).items():
        decided = name in _OF_THE_MODEL or (saved.model.use_vae and name in _OF_THE_STYLE_LAYER)
        if decided and given[name] != trained:
            raise contradiction(path, name, trained, given[name])


def run_generate(config: GenerateConfig) -> tuple[Path, int]:
    """Runs `spade generate`: writes all images and their page; returns the page's path and the number of masks.

    Raises:
        UserError: see `generate`; or the results cannot be written. Images written before the error are kept.
    """
    for name in ("samples", "how_many"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is too small; it must be at least 1")
    files = _label_files(config)
    loaded = load_model(
        checkpoint_path(config), config.data, config.model, last_weights=config.last_weights, device=config.device
    )
    if config.samples > 1 and not loaded.model.use_vae:
        raise UserError(
            f"--samples {config.samples} needs a model trained with --use_vae; this one makes one image of each mask"
        )
    if config.style_image:
        _require_encoder(loaded, f"--style_image {config.style_image}")
    run, stem = _run_and_stem(checkpoint_path(config))
    columns = ["input label", *_column_names(config)]
    masks = itertools.count()
    rows = (row for row, _ in zip(_rows(config, loaded, files), masks, strict=False))
    page = write_results_page(_unused(Path(config.results_dir) / run / stem), f"{run}, {stem}", columns, rows)
    return page, next(masks)


def _rows(config: GenerateConfig, loaded: LoadedModel, files: Sequence[LabelFile]) -> Iterator[PageRow]:
    """Yields the page's rows, one per mask."""
    for batch in _conditions(config, loaded.data, files):
        label = condition_image(batch.segmap, 0)
        pictures: list[Image.Image | None] = [label]
        for image in _images(loaded, batch, config.style_image, config.samples, config.data.seed):
            pictures.append(to_image(image[0], loaded.data.image_bits))
            if config.overlay:
                pictures.append(overlay(to_image(image[0]), label))
        yield batch.names[0], pictures


def checkpoint_path(config: GenerateConfig) -> Path:
    """Returns the path of the checkpoint to use. Raises UserError for a run name that is no plain folder name."""
    if config.checkpoint:
        return Path(config.checkpoint)
    check_name(config.name)
    return Path(config.checkpoints_dir) / config.name / f"{config.which_epoch}.safetensors"


def _run_and_stem(file: Path) -> tuple[str, str]:
    """Returns the name of the checkpoint's folder, which is the run's name, and the file's name without suffix."""
    # Links are not resolved: a link to a run keeps its own name.
    file = Path(os.path.abspath(file))
    return file.parent.name or "checkpoint", file.stem


def _unused(folder: Path) -> Path:
    """Returns the first of folder, folder_2, folder_3, ... that does not exist, so that results never mix."""
    numbered = (folder.with_name(f"{folder.name}_{number}") for number in itertools.count(2))
    return next(path for path in itertools.chain([folder], numbered) if not path.exists())


def saved_config(state: Mapping[str, Any], path: Path) -> TrainConfig:
    """Returns the config in a training run's state. Raises UserError if the config is missing or damaged."""
    if "config" not in state:
        raise UserError(
            f"{path} holds no config, so it is not a training checkpoint; pass a file that `spade train` wrote"
        )
    return config_from_dict(state["config"], str(path))


def _conditions(config: GenerateConfig, data: DataConfig, files: Sequence[LabelFile]) -> Iterator[Batch]:
    """Yields the masks of the files, or of the validation split, as batches of one without photographs."""
    with _naming_known_ids(data):
        if config.label:
            for label, instance in files:
                yield load_condition(label, data, instance)
            return
        dataset = create_dataset(data, "val", need_images=False)
        one = replace(data, batch_size=1, num_workers=0)
        loader = iter(create_loader(dataset, one, shuffle=False, epoch=0, drop_last=False))
        for _, batch in zip(range(config.how_many), loader, strict=False):
            yield batch


@contextmanager
def _naming_known_ids(data: DataConfig) -> Iterator[None]:
    """Makes the error of an unknown id say which ids the model knows: a trained model cannot get more classes."""
    try:
        yield
    except WrongIds as error:
        fix = f"The model knows {known_ids(data)}: correct the image, or use a model that was trained with more classes"
        raise DataError(replace(error.problem, fix=fix, label_nc=0)) from error


def _label_files(config: GenerateConfig) -> Sequence[LabelFile]:
    for option in ("label", "instance", "style_image"):
        path = getattr(config, option)
        if path and not Path(path).exists():
            raise UserError(f"--{option} {path} does not exist; check the path")
    if not config.label:
        if config.instance:
            raise UserError(f"--instance {config.instance} needs the --label it belongs to")
        return []
    label, instance = Path(config.label), Path(config.instance)
    if config.instance and label.is_dir() != instance.is_dir():
        raise UserError(f"--label {label} and --instance {instance} must both be files, or both folders")
    if not label.is_dir():
        return [(label, instance if config.instance else None)]
    files = sorted(p for p in label.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES)[: config.how_many]
    if not files:
        raise UserError(f"--label {label} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return [(file, instance / file.name if config.instance else None) for file in files]


def _images(loaded: LoadedModel, batch: Batch, style_image: str | Path, samples: int, seed: int) -> Iterator[Tensor]:
    """Yields `samples` images, each (1, output_nc, H, W).

    With a style image, the first image uses the mean of its style distribution, and the others use random samples.
    """
    noise = torch.Generator().manual_seed(seed)
    if style_image:
        mu, logvar = (t.cpu() for t in loaded.style(style_image))
    for i in range(samples):
        z = None
        if loaded.model.use_vae:
            z = torch.randn(1, loaded.model.z_dim, generator=noise)
            if style_image:
                z = mu + (0.5 * logvar).exp() * z * (i > 0)
        image = loaded(batch.segmap, z)
        _require_mask_size(image, batch)
        yield image


def _require_mask_size(image: Tensor, batch: Batch) -> None:
    """Raises UserError if an image and its mask differ in size, because the image would be distorted."""
    made, mask = (f"{t.shape[-1]}x{t.shape[-2]}" for t in (image, batch.segmap))
    if made != mask:
        raise UserError(
            f"the mask {batch.names[0]} is {mask} pixels after preprocessing, but the generator makes {made}; "
            "use --preprocess_mode fixed or resize_and_crop"
        )


def _column_names(config: GenerateConfig) -> list[str]:
    names = []
    for i in range(config.samples):
        number = f" {i + 1}" if config.samples > 1 else ""
        names.append(f"synthesized image{number}")
        if config.overlay:
            names.append(f"overlay{number}")
    return names


def _require_encoder(loaded: LoadedModel, what: str) -> nn.Module:
    if loaded.encoder is None:
        reason = (
            "the file of its encoder (*_net_E.pth) is not beside it" if loaded.model.use_vae else "this one was not"
        )
        raise UserError(f"{what} needs a model trained with --use_vae and its encoder; {reason}")
    return loaded.encoder


def _encoder_shape(model: ModelConfig, state: dict[str, Tensor]) -> ModelConfig:
    """Returns the model config with the encoder's width, read from its weights: the original's files have no config."""
    first = next((v for k, v in state.items() if k.startswith("layer1.") and v.dim() == 4), None)
    return model if first is None else replace(model, ngf=first.shape[0])
