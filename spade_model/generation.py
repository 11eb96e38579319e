"""Generates images from masks: `generate()` in Python, `spade generate` on the command line."""

from __future__ import annotations

import itertools
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from spade_kernels import LabelMap
from spade_kernels.condition import Segmap
from spade_model import checkpoint, checkpoint_layouts
from spade_model.architecture import infer_encoder, infer_generator
from spade_model.checkpoint_layouts import complete
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
from spade_model.data import Batch, DataError, Problem, SpadeDataset, create_dataset, load_condition
from spade_model.data.classes import WrongIds, known_ids
from spade_model.data.images import IMAGE_SUFFIXES, MAX_PIXELS, read_header, read_photograph, to_photograph
from spade_model.data.item import photograph_to_tensor
from spade_model.data.preprocess import Fit, Geometry, fit_into
from spade_model.data.sample import collate
from spade_model.errors import UserError
from spade_model.legend import find_legend
from spade_model.networks import SPADEGenerator, build_encoder, build_generator
from spade_model.networks.check import check_generator
from spade_model.pages import PageRow, write_results_page
from spade_model.training import choose_device
from spade_model.visualize import condition_image, overlay, to_image

_MODEL_OPTIONS = (
    *("label_nc", "contain_dontcare_label", "no_instance", "ade20k_shift", "output_nc", "image_bits"),
    *(option.name for option in fields(ModelConfig)),
)
"""Options that define a model. A checkpoint of this project determines them."""

_STYLE_LAYER_OPTIONS = ("crop_size", "aspect_ratio")
"""Options that decide the size of the first layer of a model with a VAE."""

_logger = logging.getLogger("spade_model")

LabelFile = tuple[Path, Path | None]
"""A label image and its instance image."""

Style = tuple[Tensor, Tensor]
"""mu and logvar of a photograph, each (1, z_dim)."""


@dataclass(frozen=True)
class GenerateConfig:
    """Options of `spade generate`."""

    name: str = "label2coco"
    """The training run whose model is used."""
    checkpoints_dir: str = "./checkpoints"
    """Folder of all runs."""
    which_epoch: str = "latest"
    """Checkpoint of the run: `latest`, or the number of a saved epoch. Several, such as 10,20,latest, are compared on
    one page."""
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
    size: str = ""
    """With --label: size in pixels of the images, 640x480, or one number for the longer side; default: the mask's own.
    Models with a VAE have one size."""
    fit: Fit = "pad"
    """For masks with other proportions than --size, or than a VAE model's one size: `pad` scales the whole mask into
    it, `crop` fills it with the mask's middle, `stretch` distorts the mask."""
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

    def fitting_size(self, height: int, width: int) -> tuple[int, int]:
        """Returns the smallest image size (H, W) that is at least (height, width), or the model's `only_size`."""
        find = getattr(self.generator, "fitting_size", None)
        return self.data.image_size if find is None else find(height, width)

    @property
    def only_size(self) -> tuple[int, int] | None:
        """(H, W) of all images of a model that makes one size only, with a VAE for example; otherwise None."""
        height, width = self.fitting_size(1, 1)
        return (height, width) if self.fitting_size(height + 1, width + 1) == (height, width) else None

    @torch.no_grad()
    def __call__(self, segmap: Segmap, z: Tensor | None = None, *, size: tuple[int, int] | None = None) -> Tensor:
        """Returns images, float32 (N, output_nc, H, W) in [-1, 1], for a condition.

        VAE models take style vectors z (N, z_dim). `size` is (H, W), one that `fitting_size` returns; by default it is
        that of training for SPADE generators, and the condition's for others.
        """
        sized = {} if size is None or not isinstance(self.generator, SPADEGenerator) else {"size": size}
        return self.generator(segmap.to(self.device), None if z is None else z.to(self.device), **sized).float()


def generate(
    checkpoint_file: str | Path,
    label: str | Path,
    *,
    instance: str | Path | None = None,
    style_image: str | Path | None = None,
    samples: int = 1,
    size: tuple[int, int] | None = None,
    fit: Fit = "pad",
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
        size: (width, height) of the images in pixels; by default that of the label image, or the model's only size.
        fit: how a label image of other proportions is brought to that size, see `preprocess.fit_into`.
        data, model: configs that replace those of the checkpoint; for the original's files, the options that their
            weights do not determine (dataset mode, crop_size, ...).

    Raises:
        UserError: a file is missing, damaged, of another architecture, or does not fit the model.
    """
    loaded = load_model(checkpoint_file, data, model, device=device)
    _check_size(loaded, size)
    with _naming_known_ids(loaded.data):
        batch = load_condition(label, loaded.data, instance, _plan(loaded, size, fit))
    bits, style = loaded.data.image_bits, loaded.style(style_image) if style_image else None
    return [to_image(image[0], bits) for image in _images(loaded, batch, style, samples, seed)]


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
        data, model: configs that replace those of the checkpoint, except for options that define the model; for the
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
        states = {n: checkpoint.as_state_dict(states[n], path) for n in ("G", "G_ema", "E") if n in states}
        weights = states["G"] if last_weights else states.get("G_ema", states["G"])
    else:
        weights = checkpoint_layouts.read(path)
        data, model = infer_generator(weights, data or default_data_config("coco"), model or ModelConfig(), str(path))
        states = checkpoint_layouts.read_beside(path, "E") if model.use_vae else {}
    check_choices(data)
    check_choices(model)
    # A batch of two skips a check for training: in eval mode batch norm accepts one value per channel.
    check_generator(data, model, batch=2)
    generator = build_generator(data, model)
    checkpoint.load_into(generator, complete(weights, generator.state_dict()), str(path))
    encoder = None
    if model.use_vae and "E" in states:
        encoder = build_encoder(data, infer_encoder(states["E"], model))
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
        decided = name in _MODEL_OPTIONS or (saved.model.use_vae and name in _STYLE_LAYER_OPTIONS)
        if decided and given[name] != trained:
            raise contradiction(path, name, trained, given[name])


@dataclass(frozen=True)
class Generated:
    """The result of `run_generate`."""

    page: Path
    masks: int
    """Number of masks from which images were made."""
    problems: list[Problem]
    """The masks that could not be read."""


def run_generate(config: GenerateConfig) -> Generated:
    """Runs `spade generate`: writes all images and their page. Masks that cannot be read are left out.

    Raises:
        UserError: see `generate`; no mask can be read; or the results cannot be written. Images written before that are
            kept, with a page.
    """
    check_choices(config)
    size = _parse_size(config)
    paths = checkpoint_paths(config)
    for name in ("samples", "how_many"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is too small; it must be at least 1")
    files = _label_files(config)
    models = [
        load_model(path, config.data, config.model, last_weights=config.last_weights, device=config.device)
        for path in paths
    ]
    # Checkpoints of one run differ in their weights only.
    loaded = models[0]
    if config.samples > 1 and not loaded.model.use_vae:
        raise UserError(
            f"--samples {config.samples} needs a model trained with --use_vae; this one makes one image of each mask"
        )
    if config.style_image:
        _require_encoder(loaded, f"--style_image {config.style_image}")
    styles = [model.style(config.style_image) if config.style_image else None for model in models]
    _check_size(loaded, size)
    if config.label and (note := _size_note(loaded, size, config.fit, files)):
        _logger.info("%s", note)
    run, stems = _run_and_stems(paths)
    columns = ["input label", *itertools.chain(*(_column_names(config, stem) for stem in stems))]
    problems: list[Problem] = []
    masks, first_label = _masks(config, loaded.data, files, _plan(loaded, size, config.fit))
    legend = find_legend(loaded.data, first_label)
    rows = _rows(config, list(zip(models, styles, strict=True)), masks, legend.colours, problems)
    first = next(rows, None)
    if first is None:
        raise UserError("\n".join(map(str, problems)))
    folder = _unused(Path(config.results_dir) / run / "_".join(stems))
    title = f"{run}, {', '.join(stems)}"
    page = write_results_page(folder, title, columns, itertools.chain([first], rows), legend.entries())
    return Generated(page, len(masks) - len(problems), problems)


def _rows(
    config: GenerateConfig,
    models: Sequence[tuple[LoadedModel, Style | None]],
    masks: Sequence[Callable[[], Batch]],
    colours: np.ndarray,
    problems: list[Problem],
) -> Iterator[PageRow]:
    """Yields the page's rows, one per mask, and adds the problems of unreadable masks to `problems`."""
    data = models[0][0].data
    for read in masks:
        try:
            with _naming_known_ids(data):
                batch = read()
        except DataError as error:
            problems.append(error.problem)
            continue
        label = condition_image(batch.segmap, 0, colours if data.label_nc else None)
        pictures: list[Image.Image | None] = [label]
        made = (_images(model, batch, style, config.samples, config.data.seed) for model, style in models)
        for image in itertools.chain.from_iterable(made):
            pictures.append(to_image(image[0], data.image_bits))
            if config.overlay:
                pictures.append(overlay(to_image(image[0]), label))
        yield batch.names[0], pictures


def checkpoint_paths(config: GenerateConfig) -> list[Path]:
    """Returns the paths of the checkpoints to use, one or more.

    Raises UserError for a run name that is no plain folder name.
    """
    if config.checkpoint:
        return [Path(config.checkpoint)]
    check_name(config.name)
    epochs = dict.fromkeys(part.strip() for part in config.which_epoch.split(","))
    return [Path(config.checkpoints_dir) / config.name / f"{epoch}.safetensors" for epoch in epochs]


def _run_and_stems(files: Sequence[Path]) -> tuple[str, list[str]]:
    """Returns the name of the checkpoints' folder, which is the run's name, and their names without suffix."""
    # Links are not resolved: a link to a run keeps its own name.
    return Path(os.path.abspath(files[0])).parent.name or "checkpoint", [file.stem for file in files]


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


def _masks(
    config: GenerateConfig, data: DataConfig, files: Sequence[LabelFile], plan: Callable[[tuple[int, int]], Geometry]
) -> tuple[list[Callable[[], Batch]], Path | None]:
    """Returns functions that read the files, or the validation split, as batches of one mask without photograph.

    The second value is the first label file; None for a data set without files.
    """
    if config.label:
        return [partial(load_condition, label, data, instance, plan) for label, instance in files], files[0][0]
    dataset = create_dataset(data, "val", need_images=False)
    return [partial(_item, dataset, index) for index in range(min(len(dataset), config.how_many))], dataset.first_label


def _item(dataset: SpadeDataset, index: int) -> Batch:
    return collate([dataset[index]], dataset.config.num_labels)


def _plan(loaded: LoadedModel, size: tuple[int, int] | None, fit: Fit) -> Callable[[tuple[int, int]], Geometry]:
    """Returns the function from a mask's (width, height) to its geometry; `size` is (width, height), too."""
    box = size if loaded.only_size is None else loaded.only_size[::-1]
    return lambda mask: fit_into(mask, box or mask, fit)


def _parse_size(config: GenerateConfig) -> tuple[int, int] | None:
    """Returns the (width, height) that --size says."""
    if not config.size:
        return None
    if not config.label:
        raise UserError(
            f"--size {config.size} is for masks given by --label; those of the data set get the size that --crop_size "
            "and --preprocess_mode say"
        )
    match = re.fullmatch(r"(\d{1,6})(?:x(\d{1,6}))?", config.size)
    width, height = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
    if not 0 < width * height <= MAX_PIXELS:
        raise UserError(
            f"--size {config.size!r} is no size in pixels: pass WIDTHxHEIGHT, such as 640x480, or one number for the "
            f"longer side; at most {MAX_PIXELS} pixels"
        )
    return width, height


def _check_size(loaded: LoadedModel, size: tuple[int, int] | None) -> None:
    """Raises UserError for a (width, height) that a model with one size cannot make."""
    only = loaded.only_size
    if size is not None and only is not None and size != only[::-1]:
        raise UserError(
            f"--size {_text(size)} does not fit: this model makes images of {_text(only[::-1])} only"
            f"{_why_one_size(loaded)}; leave --size out"
        )


def _size_note(loaded: LoadedModel, size: tuple[int, int] | None, fit: Fit, files: Sequence[LabelFile]) -> str:
    """Returns a line about images whose size differs from that of training, or cannot be made exactly; "" if none."""
    sizes = [header[1] for label, _ in files if (header := read_header(label)) is not None]
    trained = loaded.data.image_size[::-1]
    if loaded.only_size is not None:
        only = loaded.only_size[::-1]
        if all(mask == only for mask in sizes):
            return ""
        how = {
            "pad": "scaled to fit in that size as a whole (--fit crop fills it, --fit stretch distorts)",
            "crop": "scaled to fill it, and cropped",
            "stretch": "stretched to it",
        }
        return f"this model makes images of {_text(only)} only{_why_one_size(loaded)}; other masks are {how[fit]}"
    made = [_plan(loaded, size, fit)(mask).result_size for mask in sizes]
    notes = []
    if size is None and any(image != trained for image in made):
        longer = max(trained)
        notes.append(
            f"images get the sizes of their masks; the model was trained at {_text(trained)}, and --size {longer} "
            "stays close to that"
        )
    if padded := [image for image in made if loaded.fitting_size(image[1], image[0]) != image[::-1]]:
        canvas = loaded.fitting_size(padded[0][1], padded[0][0])[::-1]
        notes.append(
            f"the generator makes certain sizes only: for {_text(padded[0])} it makes {_text(canvas)}, with the mask's "
            "border repeated, and the middle is kept"
        )
    return "; ".join(notes)


def _why_one_size(loaded: LoadedModel) -> str:
    return ", which the first layer of a model with a VAE fixes" if loaded.model.use_vae else ""


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


@contextmanager
def _naming_known_ids(data: DataConfig) -> Iterator[None]:
    """Adds the ids that the model knows to the error of an unknown id: a trained model cannot get more classes."""
    try:
        yield
    except WrongIds as error:
        known = f"The model knows {known_ids(data)}"
        if error.problem.in_file:
            fix = f"{known}. {error.problem.fix}"
        else:
            fix = f"{known}: correct the image, or use a model that was trained with more classes"
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


def _images(loaded: LoadedModel, batch: Batch, style: Style | None, samples: int, seed: int) -> Iterator[Tensor]:
    """Yields `samples` images, each (1, output_nc, H, W) for a batch of one mask (H, W).

    With a style, mu and logvar, the first image uses its mean, and the others use random samples.
    """
    noise = torch.Generator().manual_seed(seed)
    height, width = batch.segmap.shape[-2:]
    size = loaded.fitting_size(height, width)
    if size[0] < height or size[1] < width:
        raise UserError(
            f"the mask {batch.names[0]} is {_text((width, height))} pixels after preprocessing, but the generator "
            f"makes {_text(size[::-1])}; use --preprocess_mode fixed or resize_and_crop"
        )
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    segmap = _extended(batch.segmap, size, top, left)
    for i in range(samples):
        z = None
        if loaded.model.use_vae:
            z = torch.randn(1, loaded.model.z_dim, generator=noise)
            if style is not None:
                mu, logvar = (part.cpu() for part in style)
                z = mu + (0.5 * logvar).exp() * z * (i > 0)
        yield loaded(segmap, z, size=size)[..., top : top + height, left : left + width]


def _extended(segmap: LabelMap | Tensor, size: tuple[int, int], top: int, left: int) -> LabelMap | Tensor:
    """Returns the condition at `size` (H, W), with its first pixel at (top, left), by repeating its border."""
    height, width = segmap.shape[-2:]
    if size == (height, width):
        return segmap
    rows = (torch.arange(size[0]) - top).clamp(0, height - 1)
    columns = (torch.arange(size[1]) - left).clamp(0, width - 1)

    def extend(planes: Tensor) -> Tensor:
        return planes[..., rows, :][..., columns]

    if not isinstance(segmap, LabelMap):
        return extend(segmap)
    edges = None if segmap.edges is None else extend(segmap.edges)
    return LabelMap(extend(segmap.labels), segmap.num_labels, edges)


def _column_names(config: GenerateConfig, stem: str) -> list[str]:
    """Returns the columns of one checkpoint's images; with several checkpoints they begin with its name."""
    epoch = ""
    if len(checkpoint_paths(config)) > 1:
        epoch = f"epoch {stem}: " if stem.isdecimal() else f"{stem}: "
    names = []
    for i in range(config.samples):
        number = f" {i + 1}" if config.samples > 1 else ""
        names.append(f"{epoch}synthesized image{number}")
        if config.overlay:
            names.append(f"{epoch}overlay{number}")
    return names


def _require_encoder(loaded: LoadedModel, what: str) -> nn.Module:
    if loaded.encoder is None:
        reason = (
            "the file of its encoder (*_net_E.pth) is not beside it" if loaded.model.use_vae else "this one was not"
        )
        raise UserError(f"{what} needs a model trained with --use_vae and its encoder; {reason}")
    return loaded.encoder
