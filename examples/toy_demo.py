"""Trains a small SPADE on procedural landscapes, on a CPU, and shows what it learned.

    python examples/toy_demo.py [--out demo] [--agreement 0.92] [--seconds 200] [--steps N]

Trains until generated images agree with their masks on 92 % of the pixels, or until the time or the number of steps is
used up. Writes a page with masks, generated and real images of landscapes the network was not trained on, and its loss
curves, and prints what ended training and how well the generated images match their masks, before and after.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch is imported, which reads it: threads that wait leave the core to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image

import spade_kernels
from spade_model.checkpoint import load_part
from spade_model.colours import ClassColours
from spade_model.config import ModelConfig, TrainConfig, default_train_config
from spade_model.data import Batch, create_dataset, create_loader
from spade_model.generation import LoadedModel, load_model
from spade_model.legend import find_legend
from spade_model.networks import build_generator, initialize
from spade_model.pages import write_results_page
from spade_model.training import train
from spade_model.visualize import condition_image, to_image

HELD_OUT = 64
SHOWN = 16
FIRST_STEPS = 5
STAGE_SECONDS = 10


def demo_config(out: Path) -> TrainConfig:
    """Returns options for 64 x 64 pixels and ngf 16, where the paper has 256 x 256 and 64: enough for landscapes."""
    config = default_train_config("toy")
    return replace(
        config,
        name="toy",
        checkpoints_dir=str(out),
        data=replace(config.data, batch_size=4),
        lr=0.0004,
        model=ModelConfig(ngf=16, ndf=16),
        no_vgg_loss=True,
        # Epochs never end the run, and the learning rate stays constant.
        niter=1000,
        print_freq=10,
    )


def batches(config: TrainConfig, split: str, count: int) -> Iterator[Batch]:
    dataset = create_dataset(replace(config.data, max_dataset_size=count), split)
    return iter(create_loader(dataset, config.data, shuffle=False, epoch=0, drop_last=False))


def real_pairs(batches: Iterable[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((batch.segmap.labels, batch.image) for batch in batches)


def generated_pairs(model: LoadedModel, batches: Iterable[Batch]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((batch.segmap.labels, model(batch.segmap).cpu()) for batch in batches)


def untrained_model(config: TrainConfig) -> LoadedModel:
    torch.manual_seed(config.data.seed)
    generator = initialize(
        build_generator(config.data, config.model), config.model.init_type, config.model.init_variance
    )
    return LoadedModel(generator.eval(), None, config.data, config.model, torch.device("cpu"))


def train_in_stages(
    config: TrainConfig, measure: Callable[[LoadedModel], float], enough: float, seconds: float, most_steps: int
) -> dict[str, Any]:
    """Trains in stages of about STAGE_SECONDS, by the pace of the stage before, and prints a line after each.

    Args:
        measure: returns a model's agreement with masks, from 0 to 1. enough: agreement that ends training.
        seconds: time after which no stage begins, measuring included. most_steps: limit on the steps; 0: none.

    Returns:
        The number of steps, the seconds they took, what ended them, and the agreement that was reached.
    """
    file = config.run_dir / "latest.safetensors"
    goal = f"{enough:.4g} agreement"
    print(f"training to {goal}, for at most {seconds:g} seconds", flush=True)
    steps, stage_steps, ending = 0, FIRST_STEPS, None
    start = stage_start = time.monotonic()
    while ending is None:
        target = min(steps + stage_steps, most_steps or math.inf)
        train(replace(config, max_steps=target, continue_train=steps > 0), progress=False)
        before, steps = steps, load_part(file, "steps")["steps"]
        agreement = measure(load_model(file))
        now = time.monotonic()
        pace = (now - stage_start) / (steps - before)
        stage_start, left = now, max(0.0, start + seconds - now)
        line = f"step {steps}: {pace:.2g} seconds per step, agreement {agreement:.3f}, at most {left:.0f} seconds left"
        print(line, flush=True)
        if agreement >= enough:
            ending = f"{goal} reached"
        elif steps < target:
            ending = f"an interruption, before {goal}"
        elif steps == most_steps:
            ending = f"the limit of {steps} steps, before {goal}"
        elif not left:
            ending = f"the limit of {seconds:g} seconds, before {goal}"
        stage_steps = max(1, round(min(STAGE_SECONDS, left) / pace))
    return {
        "steps": steps,
        "training seconds": round(now - start),
        "training ended by": ending,
        "agreement after training": round(agreement, 3),
    }


def pictures(model: LoadedModel, batches: Iterable[Batch]) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yields the names of the batches' items and (mask, generated image, real image)."""
    for batch in batches:
        generated = model(batch.segmap).cpu()
        for i, name in enumerate(batch.names):
            yield name, [condition_image(batch.segmap, i), to_image(generated[i]), to_image(batch.image[i])]


def write_page(rows: list[tuple[str, list[Image.Image]]], config: TrainConfig, out: Path) -> Path:
    out.mkdir(parents=True, exist_ok=True)
    shutil.copy(config.run_dir / "web" / "losses.png", out / "losses.png")
    return write_results_page(
        out,
        "SPADE on toy landscapes it has not seen",
        ["mask", "generated", "real"],
        rows,
        find_legend(config.data).entries(),
    )


def write_sheet(rows: list[tuple[str, list[Image.Image]]], path: Path, count: int = 8, side: int = 128) -> None:
    """Saves the README's picture: a row of masks, a row of generated images and a row of real images."""
    sheet = Image.new("RGB", (count * (side + 4), 3 * (side + 4)), "white")
    for x, (_, images) in enumerate(rows[:count]):
        for y, image in enumerate(images):
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x * (side + 4), y * (side + 4)))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder of the results (%(default)s)")
    parser.add_argument("--agreement", type=float, default=0.92, help="agreement that is enough (%(default)s)")
    parser.add_argument("--seconds", type=float, default=200, help="limit on the training time (%(default)s)")
    parser.add_argument("--steps", type=int, default=0, help="limit on the training steps; 0: none (%(default)s)")
    arguments = parser.parse_args()
    if not 0 < arguments.agreement <= 1:
        parser.error(f"--agreement {arguments.agreement} is outside 0 < agreement <= 1")
    if not 0 < arguments.seconds < math.inf:
        parser.error(f"--seconds {arguments.seconds} must be a finite number greater than 0")
    if arguments.steps < 0:
        parser.error(f"--steps {arguments.steps} must be 0 or greater")
    config = demo_config(arguments.out)
    if config.run_dir.exists():
        shutil.rmtree(config.run_dir)

    held_out = list(batches(config, "val", HELD_OUT))
    colours = ClassColours.of(real_pairs(batches(config, "train", 256)), config.data.num_labels)

    def measure(model: LoadedModel) -> float:
        return colours.agreement(generated_pairs(model, held_out))

    info = spade_kernels.build_info()
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {info['threads']} threads, {info['cpu']}",
        "backend": info["backend"],
        "agreement of real images": round(colours.agreement(real_pairs(held_out)), 3),
        "agreement before training": round(measure(untrained_model(config)), 3),
        **train_in_stages(config, measure, arguments.agreement, arguments.seconds, arguments.steps),
    }
    model = load_model(config.run_dir / "latest.safetensors")
    rows = list(itertools.islice(pictures(model, held_out), SHOWN))
    page = write_page(rows, config, arguments.out)
    write_sheet(rows, arguments.out / "demo.png")
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:26} {value}")
    print(f"\nmasks, generated and real images, loss curves: {page.resolve()}")


if __name__ == "__main__":
    main()
