"""Infers the configs of generators, encoders and discriminators from the shapes of their weights."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from torch import Tensor

from spade_model.config import DataConfig, ModelConfig, contradiction, default_data_config
from spade_model.data import DATASETS
from spade_model.errors import UserError

_NEEDED = {"fc.weight": (2, 4), "conv_img.weight": (4,), "head_0.norm_0.mlp_shared.0.weight": (4,)}
"""Parameters of every SPADE generator, and their possible numbers of dimensions."""


def infer_generator(
    state: Mapping[str, Tensor], data: DataConfig, model: ModelConfig, source: str
) -> tuple[DataConfig, ModelConfig]:
    """Infers the configs of a `*_net_G.pth` from the shapes of its weights.

    The shapes determine ngf, the channels of condition and image, norm, kernel size, VAE, z_dim and the `most`
    upsampling mode. With a VAE, crop size and upsampling mode follow from the first linear layer and the aspect ratio.
    Without one, `normal` and `more` have equal shapes, so `data.crop_size` and `model.num_upsampling_layers` are kept
    as given.

    Args:
        state: parameter names and tensors. data, model: configs with the options that cannot be inferred.
        source: where the state comes from, for messages.

    Raises:
        UserError: the state is not a SPADE generator's, its images are neither grey nor RGB, or an option that is not
            the default contradicts its shapes.
    """
    require_generator(state, source)
    shared = state["head_0.norm_0.mlp_shared.0.weight"]
    most = "up_4.conv_0.bias" in state
    ngf = state["conv_img.weight"].shape[1] * (2 if most else 1)
    mode: str = "most" if most else model.num_upsampling_layers
    found: dict[str, Any] = {"netG": "spade", "ngf": ngf, "norm_G": _norm(state, shared.shape[-1])}
    usual = default_data_config(data.dataset_mode)
    fitted = _fit_channels(_fit_image(data, len(state["conv_img.weight"]), source), shared.shape[1], usual, source)
    if state["fc.weight"].dim() == 2:
        found |= {"use_vae": True, "z_dim": state["fc.weight"].shape[1]}
        pixels = state["fc.weight"].shape[0] // (16 * ngf)
        mode, fitted = _fit_start(fitted, "most" if most else None, mode, pixels, source)
    else:
        found["use_vae"] = False
    found_model = replace(model, **found, num_upsampling_layers=mode)  # type: ignore[arg-type]
    _refuse_contradictions(model, found_model, ModelConfig(), source)
    _refuse_contradictions(data, replace(fitted, load_size=data.load_size), usual, source)
    return fitted, found_model


def _refuse_contradictions(given: Any, found: Any, usual: Any, source: str) -> None:
    """Raises UserError for an option that the shapes contradict. An option with its usual value counts as not given."""
    for part in fields(given):
        value, shown = getattr(given, part.name), getattr(found, part.name)
        # Batch norm and synchronized batch norm have the same parameters, and the same results in eval mode.
        same = part.name == "norm_G" and value.replace("sync", "") == shown.replace("sync", "")
        if value not in (shown, getattr(usual, part.name)) and not same:
            raise contradiction(source, part.name, shown, value)


def require_generator(state: Mapping[str, Tensor], source: str) -> None:
    """Raises UserError unless the state holds the weights from which `infer_generator` starts."""
    for name, ranks in _NEEDED.items():
        if name not in state or state[name].dim() not in ranks or not state[name].numel():
            what = "is missing" if name not in state else f"has shape {tuple(state[name].shape)}"
            raise UserError(
                f"{source} does not hold a SPADE generator: {name} {what}{_other_network(state)}. Pass the file whose "
                "name ends in _net_G.pth"
            )
    hidden = len(state["head_0.norm_0.mlp_shared.0.weight"])
    if hidden != 128:
        raise UserError(
            f"{source}: its SPADE layers have {hidden} hidden channels, those of this project 128. gan-compression's "
            "generators have 2 * ngf: only those with ngf 64 fit"
        )


def likely_data(state: Mapping[str, Tensor]) -> DataConfig:
    """Returns the defaults of the first data set with as many condition channels as a generator has.

    If there is none, they are those of `custom` with the label_nc that gives this number, with instance boundaries.
    """
    channels = state["head_0.norm_0.mlp_shared.0.weight"].shape[1]
    defaults = (default_data_config(name) for name in DATASETS)
    custom = default_data_config("custom")
    other = replace(custom, label_nc=max(channels - 1, 1), contain_dontcare_label=False, no_instance=channels < 2)
    return next((data for data in defaults if data.semantic_nc == channels), other)


def infer_encoder(state: Mapping[str, Tensor], model: ModelConfig) -> ModelConfig:
    """Returns the config with the encoder's width, as ngf, and its norm; other networks' weights leave it unchanged."""
    first = next((v for k, v in state.items() if k.startswith("layer1.") and v.dim() == 4 and v.numel()), None)
    return model if first is None else replace(model, ngf=len(first), norm_E=_plain_norm(state, "layer1"))


def infer_discriminator(state: Mapping[str, Tensor], model: ModelConfig) -> ModelConfig:
    """Returns the config with the discriminator's size and norm; other networks' weights leave it unchanged."""
    first = state.get("discriminator_0.model0.0.weight")
    if first is None or first.dim() != 4 or not first.numel():
        return model
    scales = {name.partition(".")[0] for name in state}
    layers = {name.split(".")[1] for name in state if name.startswith("discriminator_0.")}
    norm = _plain_norm(state, "discriminator_0.model1.0") if len(layers) > 2 else model.norm_D
    return replace(model, ndf=len(first), num_D=len(scales), n_layers_D=len(layers) - 1, norm_D=norm)


def _other_network(state: Mapping[str, Tensor]) -> str:
    """Returns the end of an error message, which names the network that the state belongs to, if recognised."""
    if any(name.startswith("discriminator_") for name in state):
        return "; these are a discriminator's weights"
    if "fc_mu.weight" in state:
        return "; these are an encoder's weights"
    return "; these are a pix2pixHD generator's weights" if any(name.startswith("model.") for name in state) else ""


def _norm(state: Mapping[str, Tensor], kernel_size: int) -> str:
    spectral = "spectral" if "head_0.conv_0.weight_orig" in state else ""
    base = "syncbatch" if "head_0.norm_0.param_free_norm.running_mean" in state else "instance"
    return f"{spectral}spade{base}{kernel_size}x{kernel_size}"


def _plain_norm(state: Mapping[str, Tensor], layer: str) -> str:
    """Returns the norm of a convolution of `networks.normalization.normalized`, which has the name `layer`."""
    with_norm = any(f"{layer}.0.{kind}" in state for kind in ("weight", "weight_orig"))
    spectral = "spectral" if f"{layer}.{'0.' if with_norm else ''}weight_orig" in state else ""
    if not with_norm:
        return f"{spectral}none"
    return f"{spectral}{'syncbatch' if f'{layer}.1.running_mean' in state else 'instance'}"


def _fit_image(data: DataConfig, channels: int, source: str) -> DataConfig:
    """Returns the config with `channels` image channels."""
    if channels not in (1, 3):
        raise UserError(f"{source} makes images of {channels} channels; only grey (1) and RGB (3) ones can be written")
    return replace(data, output_nc=channels)  # type: ignore[arg-type]


def _fit_channels(data: DataConfig, channels: int, usual: DataConfig, source: str) -> DataConfig:
    """Returns the config with `channels` condition channels.

    If needed, no_instance or contain_dontcare_label is flipped, preferably one that has its usual value.
    """
    flips = [(), ("no_instance",), ("contain_dontcare_label",), ("no_instance", "contain_dontcare_label")]
    fitting: list[tuple[int, int, DataConfig]] = []
    for names in flips:
        other = replace(data, **{name: not getattr(data, name) for name in names})  # type: ignore[arg-type]
        if other.semantic_nc == channels:
            fitting.append((sum(getattr(data, name) != getattr(usual, name) for name in names), len(fitting), other))
    if fitting:
        return min(fitting, key=lambda choice: choice[:2])[2]
    raise UserError(
        f"{source} was trained with {channels} condition channels (label_nc, plus one for the unknown class, plus one "
        f"for instance boundaries); --label_nc {data.label_nc} cannot give that. Pass the label_nc it was trained with"
    )


def _fit_start(
    data: DataConfig, fixed_mode: str | None, preferred: str, pixels: int, source: str
) -> tuple[str, DataConfig]:
    """Returns the upsampling mode and crop size for which the first feature map has `pixels` pixels."""
    from spade_model.networks.generator import start_size

    modes = [fixed_mode] if fixed_mode else [preferred, *(m for m in ("normal", "more") if m != preferred)]
    sizes = (data.crop_size, 256, 512, 1024, 128, 64)
    for mode, crop_size in itertools.product(modes, sizes):
        try:
            height, width = start_size(mode, crop_size, data.aspect_ratio)
        except UserError:
            continue
        if height * width == pixels:
            return mode, replace(data, crop_size=crop_size, load_size=crop_size)
    raise UserError(
        f"{source}: its first feature map has {pixels} pixels, which no common crop size gives with aspect_ratio "
        f"{data.aspect_ratio}. Pass --crop_size, --aspect_ratio and --num_upsampling_layers as it was trained"
    )
