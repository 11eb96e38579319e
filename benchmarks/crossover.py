"""Finds the number of distinct windows above which it is faster to evaluate a SPADE layer at every pixel.

    python benchmarks/crossover.py [--repeats 5] [--dataroot folder] [--out results.json]

The masks are random over a part of the image and constant over the rest; the size of that part determines the number of
distinct windows per pixel. Masks of a folder in the coco layout can be added: their distinct windows share more hidden
windows. The results determine the thresholds in `spade_kernels/functional.py`.
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
    """Returns a mask of random labels in the left `part` (0..1) of its width, and of class 0 in the rest."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES, (1, 256, 256), generator=generator)
    labels[:, :, int(256 * part) :] = 0
    return sk.LabelMap(labels, CLASSES, torch.zeros_like(labels, dtype=torch.bool))


def compare(size: int, channels: int, mask: sk.LabelMap, training: bool, repeats: int) -> dict[str, float]:
    """Returns hidden and distinct windows per pixel, and the ratio of the dense path's time to that of windows."""
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
    # The results of the first round are not used: it warms up.
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
    parser.add_argument("--dataroot", type=Path, help="folder of masks in the coco layout, which are measured too")
    parser.add_argument("--out", type=Path, help="JSON file to which the results are written")
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
