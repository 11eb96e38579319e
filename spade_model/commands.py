"""The subcommands of `spade`: train, generate, convert, bench, doctor."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, make_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import torch
import tyro
from tqdm import tqdm

from spade_model import checkpoint
from spade_model.architecture import likely_data
from spade_model.benchmark import tables
from spade_model.benchmark.command import BenchConfig, run_bench
from spade_model.config import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    default_data_config,
    default_train_config,
    load_config,
)
from spade_model.conversion import ConvertConfig, convert, describe, read_source
from spade_model.data import DATASETS, inspect_dataset
from spade_model.data.classes import class_ids
from spade_model.data.problem import grouped
from spade_model.errors import UserError
from spade_model.generation import GenerateConfig, checkpoint_paths, run_generate, saved_config
from spade_model.legend import find_legend
from spade_model.training import train

RENAMED = {
    "--batchSize": "--batch_size",
    "--nThreads": "--num_workers",
    "--tf_log": "--tensorboard",
    "--load_from_opt_file": "--config",
    "--label_path": "--label",
}
"""Options of the original with a new name; both names are accepted."""

REMOVED_OPTIONS = {
    "--gpu_ids": "choose with --device cpu|cuda; for several GPUs start with torchrun",
    "--model": "there is one model",
    "--netD": "there is one discriminator, multiscale",
    "--netD_subarch": "there is one discriminator, multiscale",
    "--netE": "there is one encoder",
    "--nef": "it never had an effect; the encoder's width is --ngf",
    "--optimizer": "it never had an effect; the optimizer is Adam",
    "--phase": "train reads the train split, generate the val split",
    "--display_winsize": "the page scales images itself",
    "--cache_filelist_read": "listing files is fast enough without a cache",
    "--cache_filelist_write": "listing files is fast enough without a cache",
    "--debug": "use --max_steps, --print_freq 1 and --display_freq 1",
    "--isTrain": "the command, train or generate, decides this",
}
"""Options of the original that do not exist here; the error shows the text."""


_USED_TO_GENERATE = {
    DataConfig: (
        *("dataset_mode", "dataroot", "label_dir", "instance_dir", "no_pairing_check", "max_dataset_size", "seed"),
        *("label_nc", "contain_dontcare_label", "no_instance", "ade20k_shift", "classes"),
        *("preprocess_mode", "crop_size", "aspect_ratio"),
    ),
    ModelConfig: ("num_upsampling_layers",),
}
"""Options of data and model that `spade generate --help` lists. The others have no effect, or must not contradict the
checkpoint."""


# Instance images, taken for label images by mistake, have tens of thousands.
_LISTED_IDS = 256


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `spade doctor`."""

    split: Literal["", "train", "val"] = ""
    """Split to check; by default all splits of the data set are checked."""
    data: DataConfig = field(default_factory=DataConfig)


def run(command: str, arguments: list[str]) -> int:
    """Runs a command and returns its exit status.

    Raises UserError for unusable input and when memory runs out, and SystemExit after --help or an invalid option.
    """
    commands = {"train": _train, "generate": _generate, "convert": _convert, "bench": _bench, "doctor": _doctor}
    try:
        return commands[command](_translate(arguments))
    except (RuntimeError, MemoryError) as error:
        # On a CPU, torch reports missing memory as a plain RuntimeError.
        if not isinstance(error, torch.OutOfMemoryError | MemoryError) and "can't allocate memory" not in str(error):
            raise
        first_line = (str(error) or "a file does not fit").splitlines()[0]
        smaller = "--size" if command == "generate" else "--batch_size or --crop_size, or --precision bf16"
        raise UserError(f"out of memory: {first_line} Use a smaller {smaller}") from error


def _train(arguments: list[str]) -> int:
    known, rest = _peek(arguments, "config")
    default = default_train_config(
        known.get("dataset_mode", "coco"), "--no_TTUR" in arguments, known.get("netG", "spade")
    )
    if "config" in known:
        if not known["config"]:
            raise UserError("--config needs a file, such as the config.json in a run's folder")
        default = load_config(Path(known["config"]))
    if "--continue_train" in arguments:
        run = TrainConfig(
            name=known.get("name", default.name), checkpoints_dir=known.get("checkpoints_dir", default.checkpoints_dir)
        )
        if not (run.run_dir / "config.json").exists():
            raise UserError(f"nothing to continue in {run.run_dir}: check --name and --checkpoints_dir")
        default = replace(
            load_config(run.run_dir / "config.json"),
            name=run.name,
            checkpoints_dir=run.checkpoints_dir,
            # The run may have been continued from an earlier checkpoint; what it saved since is to go on.
            which_epoch=run.which_epoch,
        )
    config: TrainConfig = _parse(TrainConfig, default, rest, "spade train")
    folder = train(config)
    if int(os.environ.get("RANK", 0)) == 0:
        page = folder / "web" / "index.html"
        print(f"saved in {folder}" + (f"; samples and loss curves: {page}" if page.exists() else ""))
    return 0


def _generate(arguments: list[str]) -> int:
    known, _ = _peek(arguments)
    default = GenerateConfig(data=default_data_config(known.get("dataset_mode", "coco")))
    files = checkpoint_paths(
        replace(
            default, **{k: known[k] for k in ("name", "checkpoints_dir", "which_epoch", "checkpoint") if k in known}
        )
    )
    file = files[0]
    if file.suffix == ".safetensors" and "--help" not in arguments:
        if missing := [path for path in files if not path.is_file()]:
            raise UserError(
                f"no model at {missing[0]}: check --name, --checkpoints_dir and --which_epoch, or pass --checkpoint"
            )
        trained = saved_config(checkpoint.load_part(file, "config"), file)
        default = replace(default, data=trained.data, model=trained.model)
        if trained.data.classes and "classes" not in known and not Path(trained.data.classes).is_file():
            print(f"the names of the classes are not shown: {trained.data.classes} of training is not here (--classes)")
            default = replace(default, data=replace(trained.data, classes=""))
    if {"--help", "-h"} & set(arguments):
        _parse(*_listing_only(_USED_TO_GENERATE, default), arguments, "spade generate")
    config: GenerateConfig = _parse(GenerateConfig, default, arguments, "spade generate")
    if config.label and file.suffix == ".safetensors":
        _require_usual_preprocessing(config.data, default.data)
    done = run_generate(config)
    for problem in done.problems:
        print(f"error: {problem}")
    images = done.masks * config.samples * len(checkpoint_paths(config))
    print(f"{_count(images, 'image')} of {_count(done.masks, 'mask')}, and their page: {done.page}")
    if done.problems:
        print(f"{_count(len(done.problems), 'mask')} could not be read")
    return 2 if done.problems else 0


def _require_usual_preprocessing(data: DataConfig, trained: DataConfig) -> None:
    """Raises UserError for options that preprocess a data set, given for masks of --label."""
    for name in ("preprocess_mode", "crop_size", "aspect_ratio"):
        if getattr(data, name) != getattr(trained, name):
            raise UserError(
                f"--{name} {getattr(data, name)} is for the masks of a data set; masks given by --label keep their "
                "size, or get the one that --size and --fit say"
            )


def _convert(arguments: list[str]) -> int:
    known, _ = _peek(arguments)
    default = ConvertConfig(data=default_data_config(known.get("dataset_mode", "custom")))
    if "--help" in arguments or "-h" in arguments:
        _parse(ConvertConfig, default, arguments, "spade convert")
    for option, purpose in (("checkpoint", "read"), ("output", "write")):
        if option not in known:
            raise UserError(f"spade convert needs --{option}, the file to {purpose}")
    source = read_source(Path(known["checkpoint"]), known.get("from", ""))
    if source.config is not None:
        default = replace(default, data=source.config.data, model=source.config.model)
    elif "dataset_mode" not in known and "label_nc" not in known:
        default = replace(default, data=likely_data(source.states["G"]))
    config: ConvertConfig = _parse(ConvertConfig, default, arguments, "spade convert")
    files, data, model = convert(
        source,
        Path(config.output),
        config.data,
        config.model,
        to=config.to,
        last_weights=config.last_weights,
        overwrite=config.overwrite,
    )
    print(f"{source.path} converted to {', '.join(map(str, files))}")
    print(describe(source, data, model))
    return 0


def _bench(arguments: list[str]) -> int:
    known, _ = _peek(arguments)
    data = default_data_config(known.get("dataset_mode", "coco" if "dataroot" in known else "toy"))
    if DATASETS[data.dataset_mode].layout is None:
        data = replace(data, crop_size=256)
    run = run_bench(_parse(BenchConfig, BenchConfig(data=data), arguments, "spade bench"))
    print(f"{tables.caption(run)}\n\n{tables.summary(run)}\n\n{tables.legend(run)}")
    return 0


def _doctor(arguments: list[str]) -> int:
    known, _ = _peek(arguments)
    default = DoctorConfig(data=default_data_config(known.get("dataset_mode", "coco")))
    config: DoctorConfig = _parse(DoctorConfig, default, arguments, "spade doctor")
    splits = [config.split] if config.split else DATASETS[config.data.dataset_mode].splits
    faults = [_check_split(config.data, split) for split in splits]
    return 2 if any(faults) else 0


def _check_split(data: DataConfig, split: str) -> int:
    """Prints the ids and the problems of a split and returns the number of errors."""
    found = inspect_dataset(data, split, progress=partial(tqdm, desc=split, disable=None))
    if found.ids:
        names = _class_names(data)
        total = sum(entry.pixels for entry in found.ids.values())
        print(
            f"{split}: {_count(len(found.ids), 'id')} in {_count(found.label_images, 'label image')}, share of pixels:"
        )
        for number, entry in islice(found.ids.items(), _LISTED_IDS):
            line = f"{number:7} {entry.pixels / total:8.2%}  in {_count(entry.images, 'image')}"
            print(f"{line}  {names.get(number, '')}".rstrip())
        if len(found.ids) > _LISTED_IDS:
            print(f"    ... and {len(found.ids) - _LISTED_IDS} more")
    for line in grouped(found.problems):
        print(line)
    said = _count(len(found.problems), "problem") if found.problems else "no problems"
    print(f"{split}: {said}" + (f" in {_count(found.items, 'item')}" if found.items else ""))
    return sum(not problem.is_warning for problem in found.problems)


def _class_names(data: DataConfig) -> dict[int, str]:
    """Returns the names of the ids of label files, as far as they have one."""
    names = zip(class_ids(data), find_legend(data).names, strict=True)
    return {number: name for number, name in names if name != str(number)}


def _translate(arguments: list[str]) -> list[str]:
    """Spells options with underscores and replaces renamed ones.

    Raises UserError for options that do not exist any more.
    """
    result = []
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            result.append(argument)
            continue
        name = "--" + name[2:].replace("-", "_")
        if name in REMOVED_OPTIONS:
            raise UserError(f"{name} is not an option here: {REMOVED_OPTIONS[name]}")
        result.append(RENAMED.get(name, name) + equals + value)
    return result


def _peek(arguments: list[str], *own: str) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of options that decide the defaults of others, and the remaining arguments.

    Options in `own` are read too, and removed from the remaining arguments.
    """

    def parse(names: Sequence[str]) -> tuple[dict[str, str], list[str]]:
        parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
        for name in names:
            parser.add_argument(f"--{name}", nargs="?", const="")
        found, rest = parser.parse_known_args(arguments)
        return vars(found), rest

    data = ("dataset_mode", "dataroot", "label_dir", "label_nc", "classes")
    files = ("name", "checkpoints_dir", "which_epoch", "checkpoint", "output", "from")
    seen, _ = parse((*data, *files, "netG"))
    taken, rest = parse(own)
    # An option without a value is left to the parser of all options, which reports the error.
    return {name: value for name, value in seen.items() if value} | taken, rest


def _take_denials(default: Any, arguments: list[str]) -> tuple[Any, list[str]]:
    """Sets the default's flags --no_... from the arguments; returns the new default and the other arguments.

    --no_no_flip undoes --no_flip: the last of both counts.
    """
    changes: dict[str, Any] = {}
    for part in fields(default):
        value = getattr(default, part.name)
        if is_dataclass(value):
            changes[part.name], arguments = _take_denials(value, arguments)
        elif part.name.startswith("no_"):
            yes, no = f"--{part.name}", f"--no_{part.name}"
            said = [argument for argument in arguments if argument in (yes, no)]
            changes[part.name] = said[-1] == yes if said else value
            arguments = [argument for argument in arguments if argument not in (yes, no)]
    return replace(default, **changes), arguments


def _listing_only(names: Mapping[type, Sequence[str]], default: Any) -> tuple[type, Any]:
    """Returns a subclass of the config's class whose parts list only the options `names`, and its default."""
    parts = {}
    for part in fields(default):
        value = getattr(default, part.name)
        if type(value) in names:
            kind = type(value)
            hints = get_type_hints(kind, include_extras=True)
            hidden: list[Any] = [
                (option.name, Annotated[hints[option.name], tyro.conf.Suppress], option.default)
                for option in fields(kind)
                if option.name not in names[kind]
            ]
            listed = make_dataclass(kind.__name__, hidden, bases=(kind,), frozen=True)
            parts[part.name] = listed(**vars(value))
    kind = make_dataclass(
        type(default).__name__,
        [(name, type(part), part) for name, part in parts.items()],
        bases=(type(default),),
        frozen=True,
    )
    return kind, kind(**vars(default) | parts)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _parse(kind: type, default: Any, arguments: list[str], program: str) -> Any:
    flat = (tyro.conf.OmitArgPrefixes,)
    default, arguments = _take_denials(default, arguments)
    return tyro.cli(kind, default=default, args=arguments, prog=program, config=flat, use_underscores=True)
