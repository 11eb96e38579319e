"""The subcommands of `spade`: train, generate, bench, doctor."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from tqdm import tqdm

from spade_model import checkpoint
from spade_model.benchmark import tables
from spade_model.benchmark.command import BenchConfig, run_bench
from spade_model.config import (
    DataConfig,
    TrainConfig,
    default_data_config,
    default_train_config,
    load_config,
)
from spade_model.data import DATASETS, check_dataset
from spade_model.errors import UserError
from spade_model.generation import GenerateConfig, checkpoint_path, run_generate, saved_config
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


@dataclass(frozen=True)
class DoctorConfig:
    """Options of `spade doctor`."""

    split: Literal["", "train", "val"] = ""
    """Split to check; by default both are checked."""
    data: DataConfig = field(default_factory=DataConfig)


def run(command: str, arguments: list[str]) -> int:
    """Runs a command and returns its exit status.

    Raises UserError for unusable input and when memory runs out, and SystemExit after --help or an invalid option.
    """
    commands = {"train": _train, "generate": _generate, "bench": _bench, "doctor": _doctor}
    try:
        return commands[command](_translate(arguments))
    except torch.OutOfMemoryError as error:
        first_line = str(error).splitlines()[0]
        raise UserError(
            f"out of memory: {first_line} Use a smaller --batch_size or --crop_size, or --precision bf16"
        ) from error


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
    file = checkpoint_path(
        replace(
            default, **{k: known[k] for k in ("name", "checkpoints_dir", "which_epoch", "checkpoint") if k in known}
        )
    )
    if file.suffix == ".safetensors" and "--help" not in arguments:
        if not file.is_file():
            raise UserError(
                f"no model at {file}: check --name, --checkpoints_dir and --which_epoch, or pass --checkpoint"
            )
        trained = saved_config(checkpoint.load_part(file, "config"), file)
        default = replace(default, data=trained.data, model=trained.model)
    config: GenerateConfig = _parse(GenerateConfig, default, arguments, "spade generate")
    page, masks = run_generate(config)
    print(f"{_count(masks * config.samples, 'image')} of {_count(masks, 'mask')}, and their page: {page}")
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
    """Prints the problems of a split and returns the number of errors."""
    items = 0

    def progress(reports: Iterable[Any], total: int) -> Iterable[Any]:
        nonlocal items
        items = total
        return tqdm(reports, total=total, desc=split, disable=None)

    problems = check_dataset(data, split, progress=progress)
    for problem in problems:
        print(f"{'warning' if problem.is_warning else 'error'}: {problem}")
    needed = [problem.label_nc for problem in problems if problem.label_nc]
    if len(needed) > 1:
        print(f"{split}: {len(needed)} label images have ids that are too large; --label_nc {max(needed)} fits all")
    found = _count(len(problems), "problem") if problems else "no problems"
    print(f"{split}: {found}" + (f" in {_count(items, 'item')}" if items else ""))
    return sum(not problem.is_warning for problem in problems)


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

    shared = ("dataset_mode", "dataroot", "label_dir", "name", "checkpoints_dir", "which_epoch", "checkpoint", "netG")
    seen, _ = parse(shared)
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


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _parse(kind: type, default: Any, arguments: list[str], program: str) -> Any:
    flat = (tyro.conf.OmitArgPrefixes,)
    default, arguments = _take_denials(default, arguments)
    return tyro.cli(kind, default=default, args=arguments, prog=program, config=flat, use_underscores=True)
