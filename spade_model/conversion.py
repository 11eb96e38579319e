"""Converts checkpoints between this project's layout and others: `spade convert` on the command line."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors import SafetensorError
from torch import Tensor

from spade_model import checkpoint, checkpoint_layouts
from spade_model.architecture import infer_discriminator, infer_encoder, infer_generator, require_generator
from spade_model.checkpoint_layouts import LAYOUTS, NETWORKS, NVLABS, OURS, CheckpointLayout, complete, find_layout
from spade_model.config import DataConfig, ModelConfig, TrainConfig, check_choices, config_from_dict
from spade_model.errors import UserError
from spade_model.files import replacing
from spade_model.networks import build_discriminator, build_encoder, build_generator
from spade_model.networks.check import check_generator

_NAMES = ", ".join([OURS, *(name for name, layout in LAYOUTS.items() if not layout.differs)])


@dataclass(frozen=True)
class ConvertConfig:
    """Options of `spade convert`.

    Options of data and model that are not given are read from the checkpoint: from its config, or from the shapes of
    its weights.
    """

    checkpoint: str = ""
    """Checkpoint to convert: a .safetensors of this project, or a generator's file of another one. Where its name
    contains _net_G, the files with _net_E (encoder) and _net_D (discriminator) beside it are converted too."""
    output: str = ""
    """File to write: .safetensors for the layout spade, and its config beside it as .json; otherwise the generator's
    file, such as latest_net_G.pth."""
    from_: Annotated[
        str,
        tyro.conf.arg(
            name="from", help=f"Layout of the checkpoint ({_NAMES}); by default it is recognized by the names in it."
        ),
    ] = ""
    to: Annotated[
        str,
        tyro.conf.arg(help=f"Layout to write ({_NAMES}); by default {OURS}, and {NVLABS} for {OURS} checkpoints."),
    ] = ""
    last_weights: bool = False
    """Convert the last weights even if the checkpoint also holds averaged (EMA) weights."""
    overwrite: bool = False
    """Replace files that exist."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)


@dataclass(frozen=True)
class Source:
    """A checkpoint that was read.

    `states` holds the state dicts of its networks, keyed by the letters of `checkpoint_layouts.NETWORKS`, with this
    project's parameter names. `average` is the state of the averaged (EMA) generator, if there is one. `config` is None
    for layouts of other projects, which have none.
    """

    path: Path
    states: dict[str, dict[str, Tensor]]
    average: dict[str, Tensor] | None = None
    config: TrainConfig | None = None


def read_source(path: Path, layout: str = "") -> Source:
    """Reads a checkpoint of any layout that can be converted.

    Args:
        layout: name of its layout. By default a .safetensors file has this project's layout, and other layouts are
            recognized by the parameter names.

    Raises:
        UserError: the file is missing, damaged, of a layout that cannot be converted, or holds no SPADE generator.
    """
    if layout == OURS or (not layout and path.suffix == ".safetensors"):
        tree = checkpoint.load_part(path, "G", "G_ema", "E", "D", "config")
        if "G" not in tree or "config" not in tree:
            raise UserError(
                f"{path} holds no {'config' if 'G' in tree else 'generator'}; pass a file that `spade train` wrote"
            )
        config = config_from_dict(tree["config"], str(path))
        if config.model.netG != "spade":
            raise UserError(f"{path} holds a {config.model.netG} generator; only those of --netG spade are converted")
        states = {n: checkpoint.as_state_dict(tree[n], path) for n in (*NETWORKS, "G_ema") if n in tree}
        average = states.pop("G_ema", None)
        return Source(path, states, average, config)
    generator = checkpoint_layouts.read(path, layout)
    require_generator(generator, str(path))
    # An encoder belongs to generators that take style vectors: those that begin with a linear layer.
    others = "ED" if generator["fc.weight"].dim() == 2 else "D"
    return Source(path, {"G": generator, **checkpoint_layouts.read_beside(path, others, layout)})


def convert(
    source: Source,
    output: Path,
    data: DataConfig,
    model: ModelConfig,
    *,
    to: str = "",
    last_weights: bool = False,
    overwrite: bool = False,
) -> tuple[list[Path], DataConfig, ModelConfig]:
    """Writes a checkpoint in another layout: all of its files, or none.

    Args:
        output: .safetensors for this project's layout; otherwise the generator's file, whose name contains _net_G
            if there are more networks.
        data, model: options that the weights do not determine, such as label_nc and crop_size.
        to: name of the layout; by default this project's, or NVLABS for checkpoints of this project.
        last_weights: convert the last weights even if there are averaged ones. overwrite: replace existing files.

    Returns:
        The written files, and the configs, with the options that were inferred from the weights.

    Raises:
        UserError: the weights fit no architecture of this project, or contradict the options; the layout cannot hold
            such a model; a file exists or cannot be written.
    """
    to = to or (OURS if source.config is None else NVLABS)
    if to == OURS and source.config is not None:
        raise UserError(f"{source.path} has the layout {OURS} already; choose another one with --to: {_NAMES}")
    layout = None if to == OURS else find_layout(to, f"{source.path} for {output}")
    states = source.states if last_weights or source.average is None else source.states | {"G": source.average}
    states, data, model = _fitted(states, data, model, str(source.path))
    if layout is not None and (reason := layout.limits(data, model, states)):
        raise UserError(f"{source.path} cannot be written in the layout {to}: {reason}")
    files = _plan(output, layout, states)
    taken = [str(file) for file in files if file.exists()]
    if taken and not overwrite:
        raise UserError(f"{', '.join(taken)} would be overwritten; choose another --output, or pass --overwrite")
    if layout is None:
        _write_all(_our_files(files, states, TrainConfig(name=output.stem, data=data, model=model)))
    else:
        _write_all(_their_files(files, states, layout))
    return files, data, model


def describe(source: Source, data: DataConfig, model: ModelConfig) -> str:
    """Returns a text that names the networks, their sizes, and the options that their weights did not determine."""
    condition = [f"label_nc {data.label_nc}", *["unknown class"] * data.contain_dontcare_label]
    condition += ["instance edges"] * (not data.no_instance)
    networks = ", ".join(NETWORKS[n] for n in source.states)
    text = f"{networks}: ngf {model.ngf}, {model.norm_G}, {model.num_upsampling_layers} upsampling, "
    text += f"{data.semantic_nc} condition channels ({', '.join(condition)})"
    if source.config is not None:
        return text
    assumed = ["dataset_mode", "label_nc", "aspect_ratio"] + ([] if model.use_vae else ["crop_size"])
    options = ", ".join(f"--{name} {getattr(data, name)}" for name in assumed)
    if model.num_upsampling_layers != "most" and not model.use_vae:
        options += f", --num_upsampling_layers {model.num_upsampling_layers}"
    return f"{text}\nnot determined by the weights: {options}; if others were used in training, pass them"


def _fitted(
    states: dict[str, dict[str, Tensor]], data: DataConfig, model: ModelConfig, name: str
) -> tuple[dict[str, dict[str, Tensor]], DataConfig, ModelConfig]:
    """Returns the states, completed, and the configs of networks that can load them.

    Raises UserError, naming the checkpoint `name`, if there are no such networks.
    """
    data, model = infer_generator(states["G"], data, model, name)
    encoder = infer_encoder(states.get("E", {}), model)
    model = infer_discriminator(states.get("D", {}), replace(model, norm_E=encoder.norm_E))
    check_choices(data)
    check_choices(model)
    # A batch of two skips a check for training: in eval mode batch norm accepts one value per channel.
    check_generator(data, model, batch=2)
    fitted = {}
    # Only shapes are needed, and on the meta device enormous ones from a damaged file take no memory.
    with torch.device("meta"):
        built = {
            "G": build_generator(data, model),
            "E": build_encoder(data, replace(encoder, use_vae=True)),
            "D": build_discriminator(data, model),
        }
    for network, state in states.items():
        module = built[network]
        assert module is not None
        fitted[network] = complete(state, module.state_dict())
        checkpoint.require_fit(module, fitted[network], f"the {NETWORKS[network]} of {name}")
    return fitted, data, model


def _plan(output: Path, layout: CheckpointLayout | None, networks: Collection[str]) -> list[Path]:
    """Returns the files to write. Raises UserError if the output's name does not fit the layout."""
    if layout is None:
        if output.suffix != ".safetensors":
            raise UserError(f"--output {output}: the name of a {OURS} checkpoint ends in .safetensors")
        return [output, output.with_suffix(".json")]
    if output.suffix == ".safetensors":
        raise UserError(f"--output {output}: other projects read PyTorch files; choose a name such as latest_net_G.pth")
    others = checkpoint_layouts.beside(output)
    if len(networks) > 1 and not others:
        raise UserError(
            f"--output {output}: its name needs _net_G, such as latest_net_G.pth, because "
            f"{' and '.join(NETWORKS[n] for n in networks if n != 'G')} go into files of their own beside it"
        )
    return [output if n == "G" else others[n] for n in networks]


_Files = dict[Path, Callable[[Path], Any]]
"""Functions that write each file's content into a given path."""


def _our_files(files: list[Path], states: dict[str, dict[str, Tensor]], config: TrainConfig) -> _Files:
    options = dataclasses.asdict(config)
    return {
        files[0]: lambda path: checkpoint.write(path, {**states, "config": options}),
        files[1]: lambda path: path.write_text(json.dumps(options, indent=2) + "\n"),
    }


def _their_files(files: list[Path], states: dict[str, dict[str, Tensor]], layout: CheckpointLayout) -> _Files:
    def writer(state: dict[str, Tensor]) -> Callable[[Path], Any]:
        # torch.save writes whole storages: a clone holds nothing but the tensor.
        return lambda path: torch.save(
            {k: v.clone() for k, v in checkpoint_layouts.from_ours(state, layout).items()}, path
        )

    return {file: writer(state) for file, state in zip(files, states.values(), strict=True)}


def _write_all(files: _Files) -> None:
    """Writes all files before any of them replaces one that exists. Raises UserError when one cannot be written."""
    try:
        with ExitStack() as stack:
            for file, write in files.items():
                write(stack.enter_context(replacing(file)))
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(
            f"could not write {', '.join(map(str, files))}: {error}. Free some space or choose another --output"
        ) from error
