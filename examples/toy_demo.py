"""Trains a small SPADE on procedural landscapes, on a CPU, and shows what it learned.

    python examples/toy_demo.py [--out demo] [--steps 600]

Writes a page with masks, generated and real images of landscapes the network has never seen, and its loss curves,
and prints how well the generated images match their masks, before and after training.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

# Before torch is imported, which reads it: threads that wait leave the core to others.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from PIL import Image

import spade_kernels
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


def demo_config(out: Path, steps: int) -> TrainConfig:
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
        max_steps=steps,
        print_freq=10,
        display_freq=max(1, steps // 5),
    )


def batches(config: TrainConfig, split: str, count: int) -> Iterator[Batch]:
    dataset = create_dataset(replace(config.data, max_dataset_size=count), split)
    return iter(create_loader(dataset, config.data, shuffle=False, epoch=0, drop_last=False))


def labels_and_images(config: TrainConfig, split: str, count: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((batch.segmap.labels, batch.image) for batch in batches(config, split, count))


def labels_and_generated(model: LoadedModel, config: TrainConfig) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return ((batch.segmap.labels, model(batch.segmap).cpu()) for batch in batches(config, "val", HELD_OUT))


def untrained_model(config: TrainConfig) -> LoadedModel:
    torch.manual_seed(config.data.seed)
    generator = initialize(
        build_generator(config.data, config.model), config.model.init_type, config.model.init_variance
    )
    return LoadedModel(generator.eval(), None, config.data, config.model, torch.device("cpu"))


def pictures(model: LoadedModel, config: TrainConfig) -> Iterator[tuple[str, list[Image.Image]]]:
    """Yields name and (mask, generated image, real image) of landscapes that were not used for training."""
    for batch in batches(config, "val", SHOWN):
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
    parser.add_argument("--out", type=Path, default=Path("demo"))
    parser.add_argument("--steps", type=int, default=600)
    arguments = parser.parse_args()
    config = demo_config(arguments.out, arguments.steps)
    if config.run_dir.exists():
        shutil.rmtree(config.run_dir)

    colours = ClassColours.of(labels_and_images(config, "train", 256), config.data.num_labels)
    before = colours.agreement(labels_and_generated(untrained_model(config), config))
    started = time.perf_counter()
    train(config)
    seconds = time.perf_counter() - started
    model = load_model(config.run_dir / "latest.safetensors")
    info = spade_kernels.build_info()
    result = {
        "date": datetime.date.today().isoformat(),
        "device": f"{platform.machine()}, {info['threads']} threads, {info['cpu']}",
        "backend": info["backend"],
        "steps": arguments.steps,
        "training seconds": round(seconds),
        "agreement of real images": round(colours.agreement(labels_and_images(config, "val", HELD_OUT)), 3),
        "agreement before training": round(before, 3),
        "agreement after training": round(colours.agreement(labels_and_generated(model, config)), 3),
    }
    rows = list(pictures(model, config))
    page = write_page(rows, config, arguments.out)
    write_sheet(rows, arguments.out / "demo.png")
    (arguments.out / "result.json").write_text(json.dumps(result, indent=2) + "\n")
    for name, value in result.items():
        print(f"{name:26} {value}")
    print(f"\nmasks, generated and real images, loss curves: {page.resolve()}")


if __name__ == "__main__":
    main()
