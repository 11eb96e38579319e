"""The training loop, with logs, sample images and checkpoints; a run can stop and resume at any step."""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
from torch import nn

from spade_kernels import LabelMap
from spade_model import checkpoint
from spade_model.config import TrainConfig, check_train_config, config_from_dict, save_config
from spade_model.data import Batch, DataError, create_dataset, create_loader
from spade_model.data.loader import count_batches
from spade_model.errors import UserError
from spade_model.files import lock, remove_leftovers
from spade_model.legend import find_legend
from spade_model.networks import SPADEGenerator
from spade_model.networks.check import check_networks
from spade_model.networks.discriminator import build_windows
from spade_model.pace import Pace, report
from spade_model.pages import SamplePage, plot_losses
from spade_model.run_log import RunLog
from spade_model.stopping import StopRequest
from spade_model.trainer import Trainer
from spade_model.visualize import condition_image, to_image


def train(config: TrainConfig, *, progress: bool = True) -> Path:
    """Trains a model, in a single process or as one of torchrun's processes, and returns the run's folder.

    The state is saved every save_latest_freq steps and save_minutes minutes, every save_epoch_freq epochs, at the end,
    and on Ctrl-C, SIGTERM, SIGHUP or SIGUSR1, which end the run after the current step. With continue_train, training
    resumes from the saved state, with results bitwise equal to an uninterrupted run.

    Raises:
        UserError: the config, the data, or the state to continue from cannot be used; another process trains the run;
            the disk is full; or the losses diverged. Earlier checkpoints are kept.
    """
    check_train_config(config)
    with _processes(config.device) as (rank, world_size):
        run = _Run(config, rank, world_size)
        try:
            run.start()
            with RunLog(
                config.run_dir,
                total_steps=run.total_steps,
                first_step=run.trainer.steps,
                tensorboard=config.tensorboard,
                progress=progress,
                quiet=rank > 0,
            ) as log:
                run.loop(log)
        except BaseException:
            run.undo_start()
            raise
        finally:
            run.close()
    return config.run_dir


class _Run:
    """A training run in one process: the data, the trainer and the position in the data."""

    def __init__(self, config: TrainConfig, rank: int, world_size: int):
        self.config, self.rank, self.world_size = config, rank, world_size
        self.folder = config.run_dir
        self.device = choose_device(config.device)
        self.latest_found = _identity(self.folder / "latest.safetensors")
        if not config.continue_train and (self.folder / "latest.safetensors").exists():
            raise UserError(
                f"{self.folder} already holds a trained model. Go on with --continue_train, choose another --name, "
                "or delete the folder"
            )
        check_networks(config.data, config.model, config.data.batch_size * world_size)
        self.dataset = create_dataset(config.data, "train")
        self.legend = find_legend(config.data, self.dataset.first_label)
        self.epoch, self.images_done = 1, 0
        self.changes = ""
        epoch_batches = count_batches(len(self.dataset), config.data, world_size)
        if epoch_batches < config.accumulate:
            raise UserError(f"--accumulate {config.accumulate} is more than the {epoch_batches} batches of an epoch")
        torch.manual_seed(config.data.seed)
        self.trainer = Trainer(config, self.device)
        self.prepare = index_builder(self.trainer.generator, config.model.num_D)
        torch.manual_seed(config.data.seed + rank + 1)
        if config.continue_train:
            self._resume(self.folder / f"{config.which_epoch}.safetensors")
        self.total_steps = self._count_steps()
        self.page: SamplePage | None = None
        self.saved_at, self.saved_time = self.trainer.steps, time.monotonic()
        self.new_folders: list[Path] = []
        self.lock: IO[str] | None = None

    def start(self) -> None:
        """Prepares the run's folder and its page of samples.

        Raises:
            UserError: they cannot be written, or another process trains the run.
        """
        if self.rank:
            return
        self._prepare_folder()
        if not self.config.no_html:
            self.page = SamplePage(self.folder / "web", self.config.name, self.legend.entries())
            self.page.rewind(self.trainer.steps)

    def undo_start(self) -> None:
        """Removes the folders that `start` made, if the run failed before its first step."""
        if self.trainer.steps == 0 and self.new_folders:
            self.page = None
            shutil.rmtree(self.folder, ignore_errors=True)
            # Folders above it may be another run's by now.
            with suppress(OSError):
                for folder in self.new_folders[1:]:
                    folder.rmdir()

    def loop(self, log: RunLog) -> None:
        """Trains until the last epoch, the step limit, or a signal to stop."""
        config, first_step, pace = self.config, self.trainer.steps, Pace()
        if first_step >= self.total_steps:
            what = "all steps" if config.max_steps == self.total_steps else "all epochs"
            more = f"raise --{'max_steps' if what == 'all steps' else 'niter'} to train on"
            log.write(f"{what} of {config.name} are done (step {first_step} of {self.total_steps}): {more}")
        elif first_step:
            log.write(f"continuing {config.name} at step {first_step}, epoch {self.epoch}{self.changes}")
        stopped = False
        with StopRequest() as stop:
            while self.trainer.steps < self.total_steps and not stopped:
                for batches in self._steps_of_epoch():
                    losses, fake = self.trainer.step(batches)
                    self.images_done += self.step_images
                    step = self.trainer.steps
                    log.advance()
                    if step % config.print_freq == 0 or step == self.total_steps:
                        self._report(log, step, losses)
                    if step % config.display_freq == 0 or step == self.total_steps:
                        self._show(log, step, batches[-1], fake)
                    seconds = pace.step()
                    if seconds is not None and step < self.total_steps:
                        log.write(report(config, seconds, step, self.total_steps))
                    is_late, stopped = self._in_any_process(self._is_save_due(), stop.received)
                    if is_late or step % config.save_latest_freq == 0:
                        self._save("latest")
                    if stopped or step >= self.total_steps:
                        break
                else:
                    self._finish_epoch()
            if self.saved_at != self.trainer.steps or not (self.folder / "latest.safetensors").exists():
                self._save("latest")
        if stopped:
            log.write(
                f"stopped at step {self.trainer.steps}; everything is saved in {self.folder}. Go on with: "
                f"spade train --name {config.name} --checkpoints_dir {config.checkpoints_dir} --continue_train"
            )

    def _is_save_due(self) -> bool:
        minutes = self.config.save_minutes
        return minutes > 0 and time.monotonic() - self.saved_time >= 60 * minutes

    def _in_any_process(self, *flags: bool) -> tuple[bool, ...]:
        """Returns for each flag True if it is set in any process; the result is equal in all processes."""
        if self.world_size == 1:
            return flags
        values = torch.tensor([float(flag) for flag in flags], device=self.device)
        dist.all_reduce(values, dist.ReduceOp.MAX)
        return tuple(bool(value) for value in values)

    def close(self) -> None:
        """Stops the sample page from reloading itself and unlocks the folder, however the run ended."""
        if self.page is not None:
            with suppress(UserError):
                self.page.finish()
        if self.lock is not None:
            self.lock.close()

    @property
    def step_images(self) -> int:
        """The number of images that all processes together take in a step."""
        return self.config.data.batch_size * self.world_size * self.config.accumulate

    def _count_steps(self) -> int:
        """Returns the number of the run's last step: the steps done, and those that the remaining images fill."""
        images, config = len(self.dataset), self.config
        later = config.niter + config.niter_decay - self.epoch
        steps = self.trainer.steps
        if later >= 0:
            steps += max(0, images - self.images_done) // self.step_images + later * (images // self.step_images)
        return min(steps, config.max_steps) if config.max_steps else steps

    def _loader(self, epoch: int, first_image: int = 0):
        return create_loader(
            self.dataset,
            self.config.data,
            shuffle=True,
            epoch=epoch,
            first_image=first_image,
            rank=self.rank,
            world_size=self.world_size,
            pin_memory=self.device.type == "cuda",
            prepare=self.prepare,
        )

    def _steps_of_epoch(self) -> Iterator[list[Batch]]:
        """Yields the batches of each remaining step of the epoch; batches that do not fill a step are dropped."""
        self.trainer.set_epoch(self.epoch)
        loader = iter(self._loader(self.epoch, self.images_done))
        while len(batches := self._next_batches(loader)) == self.config.accumulate:
            yield batches

    def _next_batches(self, loader: Iterator[Batch]) -> list[Batch]:
        try:
            return list(itertools.islice(loader, self.config.accumulate))
        except UserError as error:
            message = str(error)
            if isinstance(error, DataError):
                message += "\n`spade doctor` with the same options for the data lists every bad file"
            # Between steps the state is consistent. With several processes, saving needs the process that failed, too.
            if self.world_size == 1 and self.trainer.steps:
                self._save("latest")
                message += (
                    f"\nThe run is saved at step {self.trainer.steps}: correct the data and go on with --continue_train"
                )
            raise UserError(message) from error

    def _finish_epoch(self) -> None:
        self.epoch, self.images_done = self.epoch + 1, 0
        if self._is_kept(self.epoch - 1):
            self._save("latest", str(self.epoch - 1))

    def _is_kept(self, epoch: int) -> bool:
        return epoch % self.config.save_epoch_freq == 0

    def _report(self, log: RunLog, step: int, losses: dict[str, torch.Tensor]) -> None:
        values = {name: value.item() for name, value in losses.items()}
        log.step(step, values, epoch=self.epoch)
        broken = [name for name, value in values.items() if not torch.isfinite(losses[name])]
        if broken:
            raise self._diverged(f"{broken[0]} is {values[broken[0]]}")

    def _diverged(self, what: str) -> UserError:
        saved = (self.folder / "latest.safetensors").exists()
        advice = f"The last saved state in {self.folder} is from before; continue it" if saved else "Start again"
        return UserError(
            f"training diverged at step {self.trainer.steps}: {what}. {advice} with a lower --lr or --precision fp32"
        )

    def _show(self, log: RunLog, step: int, batch: Batch, fake: torch.Tensor) -> None:
        if self.page is None:
            return
        shown = range(min(4, len(batch.names)))
        colours = self.legend.colours if self.config.data.label_nc else None
        rows = [
            (batch.names[i], [condition_image(batch.segmap, i, colours), to_image(fake[i]), to_image(batch.image[i])])  # type: ignore[index]
            for i in shown
        ]
        plot_losses(log.records(), self.folder / "web" / "losses.png")
        self.page.add(step, ["input label", "synthesized image", "real image"], rows)

    def _save(self, *names: str) -> None:
        broken = self.trainer.first_nonfinite()
        if broken is not None:
            raise self._diverged(f"{broken} is not finite")
        ema = self.trainer.ema
        if ema is not None and self.config.ema_bn_batches:
            batches = itertools.islice(iter(self._loader(epoch=0)), self.config.ema_bn_batches)
            # Unreadable data must not keep the state from being saved; the next step that needs them reports the error.
            with suppress(UserError) if self.world_size == 1 else nullcontext():
                ema.reestimate(batch.segmap.to(self.device) for batch in batches)
        random_states = _gather_random_states(self.device, self.world_size)
        if self.rank == 0:
            state: dict[str, Any] = {
                **self.trainer.state_dict(),
                "config": dataclasses.asdict(self.config),
                "epoch": self.epoch,
                "images_done": self.images_done,
                "random": random_states,
            }
            for name in names:
                checkpoint.save(self.folder / f"{name}.safetensors", state)
        if self.world_size > 1:
            dist.barrier()
        self.saved_at, self.saved_time = self.trainer.steps, time.monotonic()

    def _resume(self, path: Path) -> None:
        if not path.exists():
            raise UserError(
                f"nothing to continue: {path} does not exist. Check --name, --checkpoints_dir and --which_epoch"
            )
        try:
            state = checkpoint.load(path)
        except UserError as error:
            # The newest file has the largest number: file times are wrong if the clock was set.
            kept = [
                int(file.stem) for file in self.folder.glob("*.safetensors") if file.stem.isdigit() and file != path
            ]
            raise UserError(f"{error}" + (f": --which_epoch {max(kept)} is the newest" if kept else "")) from error
        missing = [name for name in ("config", "epoch", "random") if name not in state]
        if not {"images_done", "batches_done"} & state.keys():
            missing.append("images_done")
        if missing:
            raise UserError(
                f"{path} holds no {missing[0]}, so no run can be resumed from it; pass a file that `spade train` wrote"
            )
        before, processes = config_from_dict(state["config"], str(path)), len(state["random"])
        self.trainer.load_state_dict(state, str(path))
        self.epoch = state["epoch"]
        # Checkpoints of earlier versions count the batches of each process.
        self.images_done = (
            state["images_done"]
            if "images_done" in state
            else state["batches_done"] * before.data.batch_size * processes
        )
        settings = (
            ("--batch_size", before.data.batch_size, self.config.data.batch_size),
            ("--accumulate", before.accumulate, self.config.accumulate),
            ("processes", processes, self.world_size),
        )
        changes = [f"{name} {new} instead of {old}" for name, old, new in settings if old != new]
        if changes:
            left = max(0, len(self.dataset) - self.images_done)
            self.changes = f": {', '.join(changes)}; the {left} images left of the epoch are shared out anew"
        if self.rank < processes:
            _set_random_state(state["random"][self.rank], self.device)

    def _prepare_folder(self) -> None:
        new_folders = [path for path in (self.folder, *self.folder.parents) if not path.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock = lock(self.folder / ".lock")
            # Another process may have trained after `latest_found` was read and before the lock was taken.
            if _identity(self.folder / "latest.safetensors") != self.latest_found:
                raise BlockingIOError
            self.new_folders = new_folders
            remove_leftovers(self.folder)
            save_config(self.config, self.folder / "config.json")
        except BlockingIOError as error:
            raise UserError(
                f"another process trains in {self.folder}: wait for its end and go on with --continue_train, or choose "
                "another --name"
            ) from error
        except OSError as error:
            raise UserError(
                f"cannot write to {self.folder}: {error.strerror}; choose another --checkpoints_dir"
            ) from error


@contextmanager
def _processes(device: str) -> Iterator[tuple[int, int]]:
    """Yields (rank, world size); joins torchrun's process group if torchrun started this process.

    Raises UserError when WORLD_SIZE is set but other variables that torchrun sets are missing or wrong.
    """
    if "WORLD_SIZE" not in os.environ or dist.is_initialized():
        yield (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        return
    cuda = device != "cpu" and torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    try:
        dist.init_process_group("nccl" if cuda else "gloo")
    except ValueError as error:
        raise UserError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']!r}, but the processes cannot find each other: {error}. "
            "Start them with torchrun, or unset WORLD_SIZE for a single process"
        ) from error
    try:
        yield dist.get_rank(), dist.get_world_size()
        # Gloo's thread frees a collective's tensors at the next collective, and needs the GIL for that. Without this
        # barrier, destroying the group would free them while its caller holds the GIL: a deadlock.
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _identity(path: Path) -> tuple[int, int] | None:
    """Returns values that change when another file replaces this one; None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


def index_builder(generator: nn.Module, scales: int) -> Callable[[LabelMap], None]:
    """Returns a function that builds the window indexes of a label map, for `scales` discriminator scales.

    The function is sent to the loader's workers, so it holds no reference to a network.
    """
    sizes, kernel_size = [], 3
    if isinstance(generator, SPADEGenerator):
        sizes, kernel_size = generator.resolutions(), generator.kernel_size
    return partial(_build_indexes, sizes=sizes, kernel_size=kernel_size, scales=scales)


def _build_indexes(label_map: LabelMap, sizes: list[tuple[int, int]], kernel_size: int, scales: int) -> None:
    label_map.prepare(sizes, kernel_size)
    build_windows(label_map, scales)


def choose_device(name: str) -> torch.device:
    """Returns the device that `name` stands for; "auto" is cuda if available. Raises UserError if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:<number>")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {name!r} cannot be used here: {reason}. Use --device cpu or auto") from error
    return (
        torch.device("cuda", torch.cuda.current_device()) if device.type == "cuda" and device.index is None else device
    )


def _gather_random_states(device: torch.device, world_size: int) -> list[dict[str, torch.Tensor]]:
    """Returns the random states of all processes, ordered by rank."""
    mine = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(device)
    if world_size == 1:
        return [mine]
    states: list[Any] = [None] * world_size
    dist.all_gather_object(states, mine)
    return states


def _set_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
