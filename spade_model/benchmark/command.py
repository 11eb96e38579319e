"""`spade bench` compares the generator with stock PyTorch on this machine and the user's masks, within minutes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from spade_kernels import LabelMap
from spade_model.benchmark import providers, results
from spade_model.benchmark.clock import interleave
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import bench_masks, settings
from spade_model.benchmark.memory import peak_of_step, saved_by_spade
from spade_model.benchmark.results import BenchRun, Result, save_runs
from spade_model.benchmark.verification import verify
from spade_model.config import DataConfig
from spade_model.errors import UserError


@dataclass(frozen=True)
class BenchConfig:
    """Options of `spade bench`."""

    ngf: int = 64
    """Generator width: channels before the last convolution."""
    masks: int = 2
    """Number of masks that are timed."""
    repeats: int = 2
    """Number of timed calls per network and mask; training is timed half as often."""
    compiled: bool = False
    """Also time torch.compile of the stock network with and without SPADE layers; each compiles for about a minute."""
    out: str = ""
    """JSON file to which the results are written, besides the printed table."""
    data: DataConfig = field(default_factory=DataConfig)


def run_bench(config: BenchConfig) -> BenchRun:
    """Checks that all networks have equal outputs, measures times and memory, and writes `config.out` if it is set.

    Raises:
        UserError: the masks or options cannot be used, or the file cannot be written.
    """
    for name in ("ngf", "masks", "repeats"):
        if getattr(config, name) < 1:
            raise UserError(f"--{name} {getattr(config, name)} is too small; it must be at least 1")
    kinds = bench_masks(config.data, config.masks, every_kind=False)
    kind, masks = next(iter(kinds.items()))
    run = BenchRun(environment(), settings(config.ngf, kinds), [])
    if config.out:
        # The file is written before the measurements too, so that a wrong path fails at once.
        save_runs([run], Path(config.out))
    with tqdm(total=3, disable=None, leave=False) as progress:
        for part in (_eval, _training, _peak):
            progress.set_description(part.__name__.strip("_"))
            run.results.extend(part(config, kind, masks))
            progress.update()
    if config.out:
        save_runs([run], Path(config.out))
    return run


def _eval(config: BenchConfig, kind: str, masks: list[LabelMap]) -> list[Result]:
    names = [n for n in providers.EVAL if n != "ours-dense" and (config.compiled or "compiled" not in n)]
    runs = providers.eval_runs(providers.settled_generator(masks[0], config.ngf), names)
    try:
        verify(runs, masks[0])
    except torch._dynamo.exc.BackendCompilerFailed as error:
        raise UserError(f"--compiled: torch.compile does not work here: {error}") from error
    times = interleave(runs, masks, config.repeats * len(masks))
    return [Result.of(results.EVAL, kind, name, values) for name, values in times.items()]


def _training(config: BenchConfig, kind: str, masks: list[LabelMap]) -> list[Result]:
    generator = providers.settled_generator(masks[0], config.ngf)
    networks = providers.training_networks(generator, ("eager", "tuned", "ours", "spade-free"))
    runs = {name: providers.training_run(network) for name, network in networks.items()}
    verify(runs, masks[0])
    times = interleave(runs, masks, max(1, config.repeats // 2) * len(masks))
    saved = {name: saved_by_spade(networks[name], masks[0]) for name in ("eager", "tuned", "ours")}
    return [
        *(Result.of(results.TRAINING, kind, name, values) for name, values in times.items()),
        *(Result.of(results.SAVED, kind, name, [value], "MB") for name, value in saved.items()),
    ]


def _peak(config: BenchConfig, kind: str, masks: list[LabelMap]) -> list[Result]:
    peaks = {name: peak_of_step(name, masks[0], config.ngf) for name in ("eager", "ours")}
    return [Result.of(results.PEAK, kind, name, [peak], "MB") for name, peak in peaks.items() if peak is not None]
