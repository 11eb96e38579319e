"""Everything a run can be told, as frozen dataclasses.

Field names are the original implementation's option names wherever it has the option (README: "Coming from the
original"). A config is plain data: `save_config` and `load_config` move it to and from JSON beside the checkpoints.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, cast, get_args, get_origin, get_type_hints

import tyro

from spade_model.errors import UserError
from spade_model.files import replacing

# Flags that say no are shown as they are, without a second form, --no_no_...; the command line still takes that one.
_No = Annotated[bool, tyro.conf.FlagCreatePairsOff]


def _registries() -> dict[str, dict[str, Any]]:
    """The registries by the options that take their names."""
    # Not at the top: what is registered there imports this module, and torch.
    from spade_model.data import DATASETS
    from spade_model.networks import GENERATORS

    return {"dataset_mode": DATASETS, "netG": GENERATORS}


def _name(option: str) -> Any:
    """The annotation with which the command line takes, and lists, the names that are registered when it is parsed."""
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
    """Where the masks and photographs are and how they become tensors."""

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
    """Label classes, without the unknown class. 0: the condition is an RGB image instead of labels."""
    contain_dontcare_label: bool = True
    """Label 255 becomes one more class, number label_nc."""
    no_instance: _No = False
    """Do not add the instance boundary plane to the condition."""
    ade20k_shift: bool = False
    """ade20k: classes 1..150 become 0..149 and 0 becomes unknown, as the paper meant. Off: ids as stored, which is what
    the original's released weights were trained with."""
    preprocess_mode: PreprocessMode = "resize_and_crop"
    """How images are resized and cropped at load time."""
    load_size: int = 286
    """Resize to this size before cropping (train)."""
    crop_size: int = 256
    """Crop to this width, in pixels; the generator's output width."""
    aspect_ratio: float = 1.0
    """Width / height of the generated image."""
    output_nc: Literal[1, 3] = 3
    """Channels of photographs and generated images: 3, RGB; or 1, grey. Photographs of the other kind are converted."""
    image_bits: Literal[8, 16] = 8
    """Bits of each channel of photographs and generated images. 16 needs --output_nc 1; photographs of 8 bits then keep
    their brightness."""
    no_flip: _No = False
    """Do not mirror training images at random."""
    batch_size: int = 1
    """Images per process and step."""
    num_workers: int = 0
    """Loader processes per training process."""
    serial_batches: bool = False
    """Take training images in order instead of shuffling."""
    max_dataset_size: int = 2**31 - 1
    """Use at most this many images."""
    no_pairing_check: _No = False
    """Do not check that label and photograph names match."""
    coco_no_portraits: bool = False
    """coco: leave out the *_portrait folders."""
    seed: int = 0
    """Seeds weights, style vectors, shuffling, augmentation and the toy images."""

    @property
    def num_labels(self) -> int:
        """Label classes including the unknown class; 0 for a dense (RGB) condition."""
        return self.label_nc + int(self.contain_dontcare_label) if self.label_nc else 0

    @property
    def semantic_nc(self) -> int:
        """Channels of the condition as the networks count them: classes (or RGB), plus the instance boundary plane."""
        return (self.num_labels or 3) + int(not self.no_instance)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of a generated image, in pixels."""
        return round(self.crop_size / self.aspect_ratio), self.crop_size


@dataclass(frozen=True)
class ModelConfig:
    """The networks' shapes."""

    netG: Annotated[str, _name("netG")] = "spade"
    """Generator."""
    ngf: int = 64
    """Generator width: channels before the last convolution."""
    norm_G: str = "spectralspadesyncbatch3x3"
    """Generator normalization: [spectral]spade<instance|batch|syncbatch><k>x<k>; pix2pixhd (default: instance):
    [spectral]<none|instance|batch|syncbatch>."""
    num_upsampling_layers: Literal["normal", "more", "most"] = "normal"
    """spade: 5, 6 or 7 doublings between the first feature map and the image; `most` adds a residual block."""
    use_vae: bool = False
    """Encode a style image into the generator's input vector."""
    z_dim: int = 256
    """Length of the style vector."""
    resnet_n_downsample: int = 4
    """pix2pixhd: number of stride-2 convolutions."""
    resnet_n_blocks: int = 9
    """pix2pixhd: number of residual blocks."""
    resnet_kernel_size: int = 3
    """pix2pixhd: kernel of the residual blocks."""
    resnet_initial_kernel_size: int = 7
    """pix2pixhd: kernel of the first and last convolution."""
    norm_E: str = "spectralinstance"
    """Encoder normalization."""
    ndf: int = 64
    """Discriminator width."""
    norm_D: str = "spectralinstance"
    """Discriminator normalization."""
    num_D: int = 2
    """Discriminator scales."""
    n_layers_D: int = 4
    """Convolutions of each discriminator scale before its output."""
    init_type: Literal["xavier", "xavier_uniform", "normal", "kaiming", "orthogonal", "none"] = "xavier"
    """Weight initialisation."""
    init_variance: float = 0.02
    """Gain (xavier, orthogonal) or standard deviation (normal) of the initialisation."""


@dataclass(frozen=True)
class TrainConfig:
    """One training run."""

    name: str = "label2coco"
    """The run's name: its folder under checkpoints_dir."""
    checkpoints_dir: str = "./checkpoints"
    """Folder of all runs."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    continue_train: bool = False
    """Go on from the run's saved state, in the middle of an epoch if it stopped there."""
    which_epoch: str = "latest"
    """With --continue_train: `latest` or an epoch number that was saved."""
    device: str = "auto"
    """`cpu`, `cuda`, or `auto`: cuda when there is one."""
    niter: int = 50
    """Epochs at the first learning rate."""
    niter_decay: int = 0
    """Epochs of linear decay to zero after that."""
    max_steps: int = 0
    """Stop after this many steps; 0: no limit."""
    lr: float = 0.0002
    """Learning rate of Adam. With TTUR the generator gets half of it and the discriminator twice."""
    no_TTUR: _No = False
    """Same learning rate for both, and --beta1, --beta2 default to 0.5 and 0.999."""
    beta1: float = 0.0
    """Adam's first moment decay."""
    beta2: float = 0.9
    """Adam's second moment decay."""
    D_steps_per_G: int = 1
    """Discriminator steps for each generator step."""
    accumulate: int = 1
    """Batches whose gradients are added up before an optimizer step."""
    gan_mode: Literal["hinge", "ls", "original", "w"] = "hinge"
    """Adversarial loss. `w` (Wasserstein) does not bound the discriminator's slope by itself: add --r1_gamma."""
    r1_gamma: float = 0.0
    """Weight of the R1 gradient penalty on photographs, which holds the discriminator's slope down; 0: none."""
    lambda_feat: float = 10.0
    """Weight of the discriminator feature matching loss."""
    no_ganFeat_loss: _No = False
    """Train without feature matching."""
    lambda_vgg: float = 10.0
    """Weight of the VGG perceptual loss."""
    no_vgg_loss: _No = False
    """Train without the VGG loss (it needs a weights file)."""
    vgg_weights: str = ""
    """VGG19 weights file; default: torch's download cache."""
    lambda_kld: float = 0.05
    """Weight of the encoder's KL divergence."""
    ema_decay: float = 0.0
    """Decay of the moving average of the generator's weights; 0: none is kept."""
    ema_bn_batches: int = 30
    """Batches over which the averaged generator's batch-norm statistics are re-estimated before it is saved."""
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
    save_epoch_freq: int = 10
    """Epochs between kept snapshots."""
    no_html: _No = False
    """Do not write the page of samples."""
    tensorboard: bool = False
    """Write TensorBoard event files."""

    @property
    def run_dir(self) -> Path:
        return Path(self.checkpoints_dir) / self.name


def default_data_config(dataset_mode: str) -> DataConfig:
    """The data set's own defaults. Raises UserError for a name that is not a data set."""
    check_choices(DataConfig(dataset_mode=dataset_mode))
    return dataclasses.replace(_registries()["dataset_mode"][dataset_mode].defaults, dataset_mode=dataset_mode)


def default_train_config(dataset_mode: str, no_TTUR: bool = False, netG: str = "spade") -> TrainConfig:
    """The options of a run for which nothing else is given. Raises UserError for an unknown data set or generator."""
    check_choices(ModelConfig(netG=netG))
    model = dataclasses.replace(_registries()["netG"][netG].defaults, netG=netG)
    betas: dict[str, Any] = {"beta1": 0.5, "beta2": 0.999} if no_TTUR else {}
    return TrainConfig(data=default_data_config(dataset_mode), model=model, no_TTUR=no_TTUR, **betas)


def check_train_config(config: TrainConfig) -> None:
    """Raises UserError for values a run cannot use; the message names option, value and range."""
    for part in (config, config.data, config.model):
        check_choices(part)
    least = {"niter": 0, "niter_decay": 0, "max_steps": 0, "D_steps_per_G": 1, "accumulate": 1, "ema_bn_batches": 0}
    least |= {"print_freq": 1, "display_freq": 1, "save_latest_freq": 1, "save_epoch_freq": 1}
    _check_least(config, least | {"lambda_feat": 0, "lambda_vgg": 0, "lambda_kld": 0, "r1_gamma": 0})
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
    """Raises UserError when an option of a config, all of whose values are known, has another value."""
    for name, choices in _choices(type(config)).items():
        if getattr(config, name) not in choices:
            raise UserError(f"--{name} {getattr(config, name)!r} is not one of {_listed(choices)}")


def check_name(name: str) -> None:
    """Raises UserError for a run name that would lead out of its parent folder."""
    if name in ("", "..") or Path(name).name != name:
        raise UserError(f"--name {name!r} must be a plain folder name; the folder around it is --checkpoints_dir")


def save_config(config: TrainConfig, path: Path) -> None:
    """Writes the config as JSON, replacing the file as a whole. Raises OSError when it cannot."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(dataclasses.asdict(config), indent=2) + "\n")


def load_config(path: Path) -> TrainConfig:
    """Reads what `save_config` wrote. Raises UserError when the file is missing, damaged, or has unknown options."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from error
    return config_from_dict(values, str(path))


def config_from_dict(values: Any, source: str) -> TrainConfig:
    """A TrainConfig from nested dicts, as in a checkpoint or a JSON file; missing options get their defaults."""
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
    """The values of each option of a config class that has a fixed set of them."""
    hints = get_type_hints(cls)
    fixed = {name: get_args(hint) for name, hint in hints.items() if get_origin(hint) is Literal}
    return fixed | {name: tuple(registry) for name, registry in _registries().items() if name in hints}


def _check_least(config: Any, least: dict[str, int]) -> None:
    for name, minimum in least.items():
        value = getattr(config, name)
        if not minimum <= value < math.inf:
            what = "is too small" if value < minimum else "is not a finite number"
            raise UserError(f"--{name} {value} {what}; it must be at least {minimum}")
