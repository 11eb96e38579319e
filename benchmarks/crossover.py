"""Where evaluating a SPADE layer at every pixel becomes faster than once per distinct window.

    python benchmarks/crossover.py [--repeats 5] [--dataroot folder] [--out results.json]

Masks are uniform noise over a part of the image and one class over the rest, which sets the number of distinct windows
per pixel, and the masks of a folder in the coco layout, where two rows more often have a hidden row in common. The
thresholds in `spade_kernels/functional.py` come from here.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

import spade_kernels as sk
from spade_kernels.functional import use_path
from spade_model.benchmark.clock import interleave
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import bench_masks, coco_or_toy, fresh

SIZES = ((8, 1024), (16, 1024), (32, 1024), (64, 512), (128, 256), (256, 128), (256, 64))
PARTS = (0.3, 0.5, 0.65, 0.8, 1.0)
REAL = 5
CLASSES = 183


def masks(dataroot: Path | None) -> list[sk.LabelMap]:
    noise = [noisy_mask(part) for part in PARTS]
    if dataroot is None:
        return noise
    return noise + bench_masks(coco_or_toy(str(dataroot), 256), REAL, every_kind=False)["real"]


def noisy_mask(part: float) -> sk.LabelMap:
    """Returns noise over `part` of the width."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (1, 256, 256), generator=generator)
    labels[:, :, int(256 * part) :] = 0
    return sk.LabelMap(labels, CLASSES, torch.zeros_like(labels, dtype=torch.bool))


def compare(size: int, channels: int, mask: sk.LabelMap, training: bool, repeats: int) -> dict[str, float]:
    """Returns distinct windows and hidden windows per pixel, and how many times longer the dense path takes."""
    layer = sk.SPADE("spadebatch3x3", channels, CLASSES + 1).train(training)
    if not training:
        sk.freeze(layer)
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last).requires_grad_(training)
    segmap = fresh(mask).prepare([(size, size)], gradients=training)

    def run(segmap: sk.LabelMap) -> None:
        with torch.set_grad_enabled(training):
            y = layer(x, segmap)
            if training:
                y.backward(y.detach())

    runs = {path: use_path(path)(run) for path in ("windows", "dense")}
    # The first round warms up.
    interleave(runs, [segmap], 1)
    times = interleave(runs, [segmap], repeats)
    index = segmap.window_index((size, size), 3)
    return {
        "hidden windows": round(len(index.hidden) / size**2, 3),
        "windows": round(len(index.modulation) / size**2, 3),
        "dense / windows": round(statistics.median(times["dense"]) / statistics.median(times["windows"]), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dataroot", type=Path, help="real masks, in the coco layout")
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()
    compared = masks(arguments.dataroot)
    result: dict[str, object] = {"environment": environment()}
    for training in (False, True):
        for size, channels in SIZES:
            name = f"{'forward + backward' if training else 'forward'}, {channels} channels, {size} x {size}"
            points = [compare(size, channels, mask, training, arguments.repeats) for mask in compared]
            result[name] = points
            print(name, *("{} {}: {}".format(*p.values()) for p in points), sep="   ", flush=True)
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
