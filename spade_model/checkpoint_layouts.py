"""Parameter names and tensors of other people's checkpoints, and their counterparts in this project.

`LAYOUTS` describes each layout as data. CONTRIBUTING.md says how to add one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from spade_model import checkpoint
from spade_model.config import DataConfig, ModelConfig
from spade_model.errors import UserError

OURS = "spade"
"""Name of this project's own layout: one .safetensors file with the config and all networks."""

NETWORKS = {"G": "generator", "E": "encoder", "D": "discriminator"}
"""Networks by the letter that names them in checkpoints and in file names such as latest_net_G.pth."""


@dataclass(frozen=True)
class Keys:
    """A pattern of names in a layout, and its counterpart here. A `*` stands for any text, equal on both sides.

    With several patterns in `ours`, their tensor is the concatenation of ours, in this order, along the first
    dimension: a joint convolution for gamma and beta, for example.
    """

    theirs: str
    ours: tuple[str, ...]


@dataclass(frozen=True)
class CheckpointLayout:
    """Description of a layout. Names without a pattern in `keys` are equal on both sides."""

    summary: str
    """Projects that write this layout."""
    keys: tuple[Keys, ...] = ()
    """Name patterns that differ from ours; the first one that fits a name counts."""
    marker: str = ""
    """Regular expression that is found in a name of every file of this layout, and in none of the earlier layouts."""
    differs: str = ""
    """Reason why no file of this layout can be converted; empty if the architectures coincide."""
    limits: Callable[[DataConfig, ModelConfig, Collection[str]], str] = lambda data, model, networks: ""
    """Function that returns the reason why a model cannot be written in this layout, or "". Its third argument holds
    the letters of the networks to write; see `NETWORKS`."""


def _nvlabs_limits(data: DataConfig, model: ModelConfig, networks: Collection[str]) -> str:
    if data.output_nc != 3:
        return f"its images have 3 channels, those of this model {data.output_nc}"
    if "E" in networks and model.z_dim != 256:
        return f"its encoder makes style vectors of length 256, that of this model {model.z_dim}"
    if "E" in networks and data.crop_size < 256:
        return f"its encoder needs images of at least 256 pixels, this model was trained with {data.crop_size}"
    return ""


_ACCELERATE = "Load it with its own code; spade_kernels.accelerate speeds it up there"

NVLABS = "nvlabs"
"""The layout of files that no other layout's marker recognizes."""

LAYOUTS: dict[str, CheckpointLayout] = {
    "oasis": CheckpointLayout(
        "boschresearch/OASIS",
        marker=r"^body\.\d+\.|^body_(up|down)\.",
        differs="OASIS's generator has 6 residual blocks (body.0 to body.5), 2 of them with the full number of "
        "channels, where this one has 7 and 3. Its SPADE layers take 64 noise channels before the labels, and its "
        f"discriminator is a segmentation U-Net. {_ACCELERATE}",
    ),
    "imaginaire": CheckpointLayout(
        "NVlabs/imaginaire",
        marker=r"(^|\.)spade_generator\.",
        differs="imaginaire's generator has plain or style-modulated convolutions between its residual blocks, 5 x 5 "
        "output convolutions and spectral norm on the convolutions of its SPADE layers, whose normalization has "
        f"parameters; this one has none of these. {_ACCELERATE}",
    ),
    "clade": CheckpointLayout(
        "tzt101/CLADE in its CLADE mode",
        marker=r"\.class_specified_affine\.",
        differs="CLADE's layers read gamma and beta from a table with one row per class; SPADE's compute them with "
        "convolutions. Models of its SPADE mode can be converted",
    ),
    "sean": CheckpointLayout(
        "ZPdesu/SEAN",
        marker=r"\.blending_gamma$",
        differs="SEAN's layers blend SPADE with style codes of each region, which this generator does not have",
    ),
    "mobile": CheckpointLayout(
        "compressed generators of mit-han-lab/gan-compression",
        marker=r"\.mlp_gamma\.conv\.",
        differs="the compressed generators of gan-compression compute gamma and beta with separable convolutions; its "
        "original generators can be converted",
    ),
    "parametrized": CheckpointLayout(
        "NVlabs/SPADE with spectral norm from torch.nn.utils.parametrizations",
        keys=(
            Keys("*.parametrizations.weight.original", ("*.weight_orig",)),
            Keys("*.parametrizations.weight.0._u", ("*.weight_u",)),
            Keys("*.parametrizations.weight.0._v", ("*.weight_v",)),
        ),
        marker=r"\.parametrizations\.weight\.original$",
        limits=_nvlabs_limits,
    ),
    NVLABS: CheckpointLayout(
        "NVlabs/SPADE, tzt101/CLADE in its SPADE mode, original generators of mit-han-lab/gan-compression",
        limits=_nvlabs_limits,
    ),
}


def find_layout(name: str, source: str) -> CheckpointLayout:
    """Returns the layout with this name. Raises UserError for unknown names and layouts that cannot be converted."""
    if name not in LAYOUTS:
        raise UserError(f"{name!r} is not a checkpoint layout; there are {OURS}, {', '.join(LAYOUTS)}")
    if LAYOUTS[name].differs:
        raise UserError(f"{source} cannot be converted, its layout is {name}: {LAYOUTS[name].differs}")
    return LAYOUTS[name]


def recognize(names: Collection[str]) -> str:
    """Returns the name of the first layout whose marker is found in one of the parameter names, by default `NVLABS`."""
    for layout, description in LAYOUTS.items():
        if description.marker and any(re.search(description.marker, name) for name in names):
            return layout
    return NVLABS


def read(path: Path, layout: str = "") -> dict[str, Tensor]:
    """Reads a network's file of another layout; returns its state dict with this project's parameter names.

    Args:
        layout: name of the layout; by default it is recognized by the names in the file.

    Raises:
        UserError: the file is missing, damaged, no state dict, or of a layout that cannot be converted.
    """
    content = checkpoint.read_weights(path)
    description = find_layout(layout or recognize(list(_tensor_names(content))), str(path))
    return to_ours(checkpoint.as_state_dict(content, path), description, str(path))


def read_beside(path: Path, networks: Collection[str], layout: str = "") -> dict[str, dict[str, Tensor]]:
    """Reads those files of other networks that exist beside a generator's file; see `beside` and `read`.

    Args:
        networks: letters of the networks to read, by which the result is keyed.
    """
    return {n: read(file, layout) for n, file in beside(path).items() if n in networks and file.exists()}


def beside(path: Path) -> dict[str, Path]:
    """Returns the paths of encoder and discriminator beside a generator's file; none if its name lacks _net_G."""
    if "_net_G" not in path.name:
        return {}
    return {n: path.with_name(path.name.replace("_net_G", f"_net_{n}")) for n in NETWORKS if n != "G"}


def to_ours(state: Mapping[str, Tensor], layout: CheckpointLayout, source: str) -> dict[str, Tensor]:
    """Returns the tensors of another layout under this project's names.

    Raises:
        UserError: a joint tensor cannot be split, or two of their names become the same name here.
    """
    result: dict[str, Tensor] = {}
    for name, tensor in state.items():
        names = next((ours for keys in layout.keys if (ours := _translate(name, keys.theirs, keys.ours))), (name,))
        if len(names) > 1 and (tensor.dim() == 0 or tensor.shape[0] % len(names)):
            raise UserError(
                f"{source}: {name} has shape {tuple(tensor.shape)}, which cannot be split into {len(names)} equal parts"
            )
        parts = tensor.tensor_split(len(names)) if len(names) > 1 else (tensor,)
        for own_name, part in zip(names, parts, strict=True):
            if own_name in result:
                raise UserError(f"{source} holds {own_name} twice, under two names; the second one is {name}")
            result[own_name] = part
    return result


def from_ours(state: Mapping[str, Tensor], layout: CheckpointLayout) -> dict[str, Tensor]:
    """Returns the tensors of a complete state dict of this project under the names of another layout."""
    result: dict[str, Tensor] = {}
    joined: set[str] = set()
    for name in state:
        if name in joined:
            continue
        patterns = ((keys.theirs, *keys.ours) for keys in layout.keys)
        theirs, *parts = next((found for p in patterns if (found := _translate(name, p[1], p))), (name, name))
        joined.update(parts)
        result[theirs] = torch.cat([state[part] for part in parts]) if len(parts) > 1 else state[name]
    return result


def complete(state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts a state dict of an old PyTorch version to the current format.

    Old state dicts lack spectral norm's second vector and batch norm's counters, and also hold the normalized weight.
    `wanted` is the state dict of the network that will load the result.
    """
    result = {k: v for k, v in state.items() if not (k.endswith(".weight") and f"{k}_orig" in state)}
    for name, value in wanted.items():
        if name in result:
            continue
        stem, _, kind = name.rpartition(".")
        if kind == "num_batches_tracked":
            result[name] = torch.zeros_like(value, device="cpu")
        elif kind == "weight_v" and {f"{stem}.weight_orig", f"{stem}.weight_u"} <= result.keys():
            weight, u = result[f"{stem}.weight_orig"], result[f"{stem}.weight_u"]
            if weight.dim() > 1 and u.shape == weight.shape[:1] and u.dtype == weight.dtype:
                result[name] = F.normalize(weight.flatten(1).t() @ u, dim=0, eps=1e-12)
    return result


def _tensor_names(tree: Any, prefix: str = "") -> Iterator[str]:
    """Yields the names of all tensors in nested dicts, joined by dots and without DataParallel's `module.`."""
    if isinstance(tree, Tensor):
        yield prefix
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            step = str(name).removeprefix("module.")
            yield from _tensor_names(value, f"{prefix}.{step}" if prefix else step)


def _translate(name: str, pattern: str, others: tuple[str, ...]) -> tuple[str, ...]:
    """Returns the other patterns with the texts that `*` stands for in the name; () if the pattern does not fit."""
    found = re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name)
    if found is None:
        return ()
    return tuple(_fill(other, found.groups()) for other in others)


def _fill(pattern: str, texts: tuple[str, ...]) -> str:
    for text in texts:
        pattern = pattern.replace("*", text, 1)
    return pattern
