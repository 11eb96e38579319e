"""The options of data, networks and training as frozen dataclasses.

Field names are the original implementation's option names wherever it has the option (README: "Coming from the
original"). A config holds plain values only: `save_config` writes it as JSON beside the checkpoints, and `load_config`
reads it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

from spade_model import registry
from spade_model.errors import UserError
from spade_model.files import replacing

# The help shows flags such as --no_flip without a second form --no_no_flip; `spade` still accepts the second form.
_No = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def _registries() -> dict[str, dict[str, Any]]:
    """Returns the registries by the options whose values are their names."""
    registry.load()
    return {"dataset_mode": registry.DATASETS, "netG": registry.GENERATORS}


def _name(option: str) -> Any:
    """Returns the annotation of an option whose choices are the names that are registered when it is parsed."""
    return tyro.conf.arg(
        constructor_factory=lambda: cast(Any, Literal[tuple(_registries()[option])]),
        # tyro writes the defaults of such options as lists.
        help_behavior_hint=lambda default: "(default: " + default.strip("[']") + ")",
    )


PreprocessMode = Literal[
    "resize_and_crop",
    "crop",
    "scale_width",
    "scale_width_and_crop",
    "scale_shortside",
    "scale_shortside_and_crop",
    "fixed",
    "none",
]


@dataclass(frozen=True)
class DataConfig:
    """Options for finding and preprocessing masks and photographs."""

    dataset_mode: Annotated[str, _name("dataset_mode")] = "coco"
    """Folder layout and defaults; `custom` takes --label_dir and --image_dir, `toy` needs no files."""
    dataroot: str = "./datasets"
    """Root folder of the data set."""
    label_dir: str = ""
    """custom: folder of label images (or of RGB condition images with --label_nc 0)."""
    image_dir: str = ""
    """custom: folder of photographs."""
    instance_dir: str = ""
    """custom: folder of instance id images."""
    label_nc: int = 182
    """Number of label classes, without the unknown class. With 0 the condition is an RGB image instead of labels."""
    contain_dontcare_label: bool = True
    """Treat label 255 as an additional class, "unknown", with the class number label_nc."""
    classes: str = ""
    """CSV file with the id, the name and, if wanted, the colour (#rrggbb) of each class, for the legends of pages."""
    no_instance: _No = False
    """Do not add the instance boundary plane to the condition."""
    ade20k_shift: bool = False
    """ade20k: map ids 1..150 to classes 0..149 and id 0 to unknown, as the paper intends. Without this flag, ids are
    used as stored; the original's released weights were trained in this way."""
    preprocess_mode: PreprocessMode = "resize_and_crop"
    """How images are resized and cropped at load time."""
    load_size: int = 286
    """Size in pixels (width, or short side) to which training images are resized before they are cropped."""
    crop_size: int = 256
    """Width in pixels of the crop and of generated images."""
    aspect_ratio: float = 1.0
    """Width / height of the generated image."""
    output_nc: Literal[1, 3] = 3
    """Channels of photographs and generated images: 3 (RGB) or 1 (grey). Photographs with the other number of channels
    are converted."""
    image_bits: Literal[8, 16] = 8
    """Bits per channel of photographs and generated images. 16 needs --output_nc 1; the levels of 8-bit photographs are
    then scaled to the 16-bit range."""
    no_flip: _No = False
    """Do not flip training images horizontally at random."""
    batch_size: int = 1
    """Images per process and step."""
    num_workers: int = 0
    """Data-loader worker processes per training process."""
    serial_batches: bool = False
    """Take training images in order instead of shuffling."""
    max_dataset_size: int = 2**31 - 1
    """Use at most this many images."""
    no_pairing_check: _No = False
    """Do not check that label and photograph names match."""
    coco_no_portraits: bool = False
    """coco: leave out the *_portrait folders."""
    seed: int = 0
    """Random seed for weights, style vectors, shuffling, augmentation and the toy images."""

    @property
    def num_labels(self) -> int:
        """Number of label classes including the unknown class; 0 for an RGB condition."""
        return self.label_nc + int(self.contain_dontcare_label) if self.label_nc else 0

    @property
    def semantic_nc(self) -> int:
        """Number of condition channels: one per class (or three for RGB), plus one for instance boundaries if used."""
        return (self.num_labels or 3) + int(not self.no_instance)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a generated image, in pixels."""
        return round(self.crop_size / self.aspect_ratio), self.crop_size


@dataclass(frozen=True)
class ModelConfig:
    """Options for the architecture of the networks."""

    netG: Annotated[str, _name("netG")] = "spade"
    """Generator architecture."""
    ngf: int = 64
    """Base number of channels of the generator and the encoder."""
    norm_G: str = "spectralspadesyncbatch3x3"
    """Generator normalization. spade: [spectral]spade<instance|batch|syncbatch><k>x<k>. pix2pixhd:
    [spectral]<none|instance|batch|syncbatch>, by default instance."""
    num_upsampling_layers: Literal["normal", "more", "most"] = "normal"
    """spade: 5, 6 or 7 upsampling steps by a factor of 2. `most` also adds a residual block."""
    use_vae: bool = False
    """Train an encoder that maps a style image to the generator's input vector."""
    z_dim: int = 256
    """Length of the style vector."""
    resnet_n_downsample: int = 4
    """pix2pixhd: number of stride-2 convolutions."""
    resnet_n_blocks: int = 9
    """pix2pixhd: number of residual blocks."""
    resnet_kernel_size: int = 3
    """pix2pixhd: kernel size of the residual blocks."""
    resnet_initial_kernel_size: int = 7
    """pix2pixhd: kernel size of the first and last convolution."""
    norm_E: str = "spectralinstance"
    """Encoder normalization."""
    ndf: int = 64
    """Discriminator width: channels of its first layer."""
    norm_D: str = "spectralinstance"
    """Discriminator normalization."""
    num_D: int = 2
    """Number of discriminator scales."""
    n_layers_D: int = 4
    """Number of convolutions at each discriminator scale, without the output convolution."""
    init_type: Literal["xavier", "xavier_uniform", "normal", "kaiming", "orthogonal", "none"] = "xavier"
    """Weight initialisation."""
    init_variance: float = 0.02
    """Gain (xavier, orthogonal) or standard deviation (normal) of the initialisation."""


@dataclass(frozen=True)
class TrainConfig:
    """Options of a training run."""

    name: str = "label2coco"
    """Name of the run, and of its folder under checkpoints_dir."""
    checkpoints_dir: str = "./checkpoints"
    """Folder that contains the folders of all runs."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    continue_train: bool = False
    """Resume the run from a checkpoint, in the middle of an epoch if it was saved there."""
    which_epoch: str = "latest"
    """Checkpoint to resume from with --continue_train: `latest`, or the number of a saved epoch."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:<number>`, or `auto`, which is cuda if available."""
    niter: int = 50
    """Epochs at the initial learning rate."""
    niter_decay: int = 0
    """Further epochs in which the learning rate decays linearly to zero."""
    max_steps: int = 0
    """Stop after this many steps; 0: no limit."""
    lr: float = 0.0002
    """Learning rate of Adam. With TTUR (two time-scale update rule) the generator uses half of it and the
    discriminator double."""
    no_TTUR: _No = False
    """Use the same learning rate for generator and discriminator; --beta1 and --beta2 then default to 0.5 and 0.999."""
    beta1: float = 0.0
    """Adam's first moment decay."""
    beta2: float = 0.9
    """Adam's second moment decay."""
    D_steps_per_G: int = 1
    """Discriminator steps for each generator step."""
    accumulate: int = 1
    """Number of batches over which gradients are averaged for each optimizer step."""
    gan_mode: Literal["hinge", "ls", "original", "w"] = "hinge"
    """Adversarial loss. `w` (Wasserstein) does not limit the discriminator's gradients: use it with --r1_gamma."""
    r1_gamma: float = 0.0
    """Weight of the R1 gradient penalty, which limits the discriminator's gradients on photographs; 0 turns it off."""
    lambda_feat: float = 10.0
    """Weight of the discriminator feature matching loss."""
    no_ganFeat_loss: _No = False
    """Train without feature matching."""
    lambda_vgg: float = 10.0
    """Weight of the VGG perceptual loss."""
    no_vgg_loss: _No = False
    """Train without the VGG loss, which needs a file of weights."""
    vgg_weights: str = ""
    """File of VGG19 weights; by default it is taken from torch's download cache."""
    lambda_kld: float = 0.05
    """Weight of the encoder's KL divergence."""
    ema_decay: float = 0.0
    """Decay of the exponential moving average (EMA) of the generator's weights; 0 turns it off."""
    ema_bn_batches: int = 30
    """Number of batches over which the EMA generator's batch-norm statistics are re-estimated before each save."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Autocast precision of forward passes; weights stay fp32."""
    compile: bool = False
    """Run the networks through torch.compile."""
    print_freq: int = 100
    """Steps between lines of the log."""
    display_freq: int = 100
    """Steps between sample images."""
    save_latest_freq: int = 5000
    """Steps between saves of the latest state."""
    save_minutes: float = 10.0
    """Minutes between saves of the latest state, beside --save_latest_freq; 0: save by steps only."""
    save_epoch_freq: int = 10
    """Epochs between checkpoints that are kept under their epoch number."""
    no_html: _No = False
    """Do not write the page of samples."""
    tensorboard: bool = False
    """Write TensorBoard event files."""

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoints_dir) / self.name


def default_data_config(dataset_mode: str) -> DataConfig:
    """Returns the default options of a data set. Raises UserError for an unknown `dataset_mode`."""
    check_choices(DataConfig(dataset_mode=dataset_mode))
    return dataclasses.replace(_registries()["dataset_mode"][dataset_mode].defaults, dataset_mode=dataset_mode)


def default_train_config(dataset_mode: str, no_TTUR: bool = False, netG: str = "spade") -> TrainConfig:
    """Returns the default training options. Raises UserError for an unknown data set or generator."""
    check_choices(ModelConfig(netG=netG))
    model = dataclasses.replace(_registries()["netG"][netG].defaults, netG=netG)
    betas: dict[str, Any] = {"beta1": 0.5, "beta2": 0.999} if no_TTUR else {}
    return TrainConfig(data=default_data_config(dataset_mode), model=model, no_TTUR=no_TTUR, **betas)


def check_train_config(config: TrainConfig) -> None:
    """Raises UserError for values out of range; the message names the option, its value and its range."""
    for part in (config, config.data, config.model):
        check_choices(part)
    least = {"niter": 0, "niter_decay": 0, "max_steps": 0, "D_steps_per_G": 1, "accumulate": 1, "ema_bn_batches": 0}
    least |= {"print_freq": 1, "display_freq": 1, "save_latest_freq": 1, "save_epoch_freq": 1}
    _check_least(config, least | {"lambda_feat": 0, "lambda_vgg": 0, "lambda_kld": 0, "r1_gamma": 0, "save_minutes": 0})
    _check_least(config.model, {"ngf": 1, "ndf": 1, "z_dim": 1, "num_D": 1, "n_layers_D": 1, "init_variance": 0})
    if not 0 < config.lr < math.inf:
        raise UserError(f"--lr {config.lr} must be a finite number greater than 0")
    for name in ("beta1", "beta2", "ema_decay"):
        if not 0 <= getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is outside 0 <= {name} < 1")
    if config.niter + config.niter_decay < 1:
        raise UserError("--niter and --niter_decay are both 0: there is no epoch to train; set --niter to 1 or more")
    check_name(config.name)


def check_choices(config: Any) -> None:
    """Raises UserError when an option with a fixed set of values has a value outside that set."""
    for name, choices in _choices(type(config)).items():
        if getattr(config, name) not in choices:
            raise UserError(f"--{name} {getattr(config, name)!r} is not one of {_listed(choices)}")


def contradiction(source: object, option: str, trained: Any, given: Any) -> UserError:
    """Returns the error for an option whose value differs from the one that a checkpoint was trained with."""
    return UserError(
        f"{source} was trained {_said(option, trained)}, not {_said(option, given)}; leave the option out, because the "
        "checkpoint decides it, or use another checkpoint"
    )


def _said(option: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"{'with' if value else 'without'} --{option}"
    return f"with --{option} {value}"


def check_name(name: str) -> None:
    """Raises UserError unless the run's name is that of a single folder; a path could leave checkpoints_dir."""
    if name in ("", "..") or Path(name).name != name:
        raise UserError(f"--name {name!r} must be a plain folder name; the folder around it is --checkpoints_dir")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the config as JSON and replaces the file atomically. Raises OSError when the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n", encoding="utf-8")


def load_config(path: Path) -> TrainConfig:
    """Reads a config of `save_config`. Raises UserError for a missing or damaged file and for unknown options."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return config_from_dict(values, str(path))


def config_from_dict(values: Any, source: str) -> TrainConfig:
    """Builds a TrainConfig from the nested dicts of a checkpoint or a JSON file; missing options get their defaults.

    Raises UserError, naming `source`, for unknown options and for values of a wrong type or outside the choices.
    """
    rest = dict(_require_dict(values, "the config", source))
    data = _build(DataConfig, rest.pop("data", {}), source)
    model = _build(ModelConfig, rest.pop("model", {}), source)
    return _build(TrainConfig, rest | {"data": data, "model": model}, source)


def _build(cls, values: Any, source: str):
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(_require_dict(values, f"the {cls.__name__}", source)) - set(fields))
    if unknown:
        raise UserError(f"{source} has an unknown option {unknown[0]!r}; it was written by another version or by hand")
    choices = _choices(cls)
    for name, value in values.items():
        default = fields[name].default
        if isinstance(default, (bool, int, float, str)) and not _same_kind(value, default):
            raise UserError(f"{source}: option {name!r} is {value!r}, expected something like {default!r}")
        if value not in choices.get(name, (value,)):
            raise UserError(f"{source}: option {name!r} is {value!r}, which is not one of {_listed(choices[name])}")
    return cls(**values)


def _require_dict(values: Any, what: str, source: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise UserError(f"{source}: {what} is {values!r}, expected a JSON object of options")
    return values


def _same_kind(value: Any, default: Any) -> bool:
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        return isinstance(value, (int, float))
    return isinstance(value, type(default))


def _listed(choices: tuple[Any, ...]) -> str:
    return ", ".join(map(str, choices))


def _choices(cls: type) -> dict[str, tuple[Any, ...]]:
    """Returns the allowed values of each option that has a fixed set of values."""
    hints = get_type_hints(cls)
    fixed = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    return fixed | {name: tuple(registry) for name, registry in _registries().items() if name in hints}


def _check_least(config: Any, least: dict[str, int]) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        if not minimum <= value < math.inf:
            what = "is too small" if value < minimum else "is not a finite number"
            raise UserError(f"--{name} {value} {what}; it must be at least {minimum}")
