"""How long a SPADE generator takes: stock operators on one-hot planes, ours, and the network with its layers deleted.

    python benchmarks/generator.py [--dataroot coco_stuff] [--masks 4] [--repeats 5] [--out results.json]

Providers take turns on the same mask, and every repeat has a fresh label map, so that building its index is counted.
Outputs are compared before anything is timed. Ratios within one run mean something; absolute times hardly do.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F

import spade_kernels as sk
from spade_kernels.testing import stock_spade
from spade_model.config import default_data_config
from spade_model.data import create_dataset
from spade_model.networks import SPADEGenerator, initialize


def eager_layer(layer, x, segmap, slope=1.0):
    """Stock operators in the original's order, on the one-hot condition (channels-last, as `LabelMap.one_hot` is)."""
    return stock_spade(layer, x, segmap, slope)


def deleted_layer(layer, x, segmap, slope=1.0):
    """No layer: the activation alone."""
    return F.leaky_relu(x, slope) if slope != 1 else x


@contextlib.contextmanager
def provider(name: str) -> Iterator[None]:
    """Runs every SPADE layer the provider's way."""
    if name in ("eager", "spade-free"):
        with mock.patch.object(sk.SPADE, "forward", eager_layer if name == "eager" else deleted_layer):
            yield
        return
    sk.use_backend(name)
    try:
        yield
    finally:
        sk.use_backend("auto")


def condition(name: str, mask: sk.LabelMap) -> sk.LabelMap | torch.Tensor:
    """What the provider is given; making it is part of its time."""
    fresh = sk.LabelMap(mask.labels, mask.num_labels, mask.edges)
    return fresh.one_hot() if name == "eager" else fresh


def evaluate(generator: SPADEGenerator, name: str, mask: sk.LabelMap) -> torch.Tensor:
    with torch.no_grad(), provider(name):
        return generator.eval()(condition(name, mask))


def train(generator: SPADEGenerator, name: str, mask: sk.LabelMap) -> torch.Tensor:
    with provider(name):
        generator.train().zero_grad(set_to_none=True)
        image = generator(condition(name, mask))
        image.square().mean().backward()
        return image.detach()


def settled_generator(mask: sk.LabelMap, ngf: int) -> SPADEGenerator:
    """A generator with random weights, and running statistics that fit its activations."""
    torch.manual_seed(0)
    generator = SPADEGenerator(mask.channels, ngf=ngf)
    initialize(generator, "xavier", 1.0)
    norms = [module for module in generator.modules() if isinstance(module, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    with torch.no_grad():
        generator.train()(mask)
    for norm in norms:
        norm.momentum = 0.1
    return generator


def masks(dataroot: str, count: int) -> list[sk.LabelMap]:
    """Real masks of a folder in the coco layout, or toy landscapes, 256 x 256."""
    config = default_data_config("coco" if dataroot else "toy")
    config = replace(config, dataroot=dataroot, crop_size=256, load_size=256)
    dataset = create_dataset(config, "val", need_images=False)
    samples = [dataset[i] for i in range(min(count, len(dataset)))]
    return [sk.LabelMap(s.condition[None], config.num_labels, s.edges[None]) for s in samples]  # type: ignore[index]


def check(generator: SPADEGenerator, providers: list[str], mask: sk.LabelMap) -> float:
    """Largest difference of an output from eager's; stops the run when it is not rounding."""
    expected = evaluate(generator, "eager", mask)
    worst = max((evaluate(generator, p, mask) - expected).abs().max().item() for p in providers if p != "spade-free")
    if worst > 1e-3:
        raise SystemExit(f"outputs differ from eager by {worst}: nothing is timed")
    return worst


def measure(run: Callable, generator, providers: list[str], conditions: list[sk.LabelMap], repeats: int) -> dict:
    """Milliseconds of each provider (median, 20th and 80th percentile), and the ratios that matter."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for repeat in range(repeats + 1):
        for mask in conditions:
            for name in providers:
                started = time.perf_counter()
                run(generator, name, mask)
                if repeat:
                    times[name].append((time.perf_counter() - started) * 1e3)
    result: dict[str, Any] = {}
    for name, values in times.items():
        low, middle, high = (
            statistics.quantiles(values, n=5)[0],
            statistics.median(values),
            statistics.quantiles(values, n=5)[3],
        )
        result[name] = {"p20": round(low, 1), "p50": round(middle, 1), "p80": round(high, 1)}
    ours = result["cpu" if "cpu" in result else "reference"]["p50"]
    result["eager / ours"] = round(result["eager"]["p50"] / ours, 2)
    result["ours / spade-free"] = round(ours / result["spade-free"]["p50"], 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", default="", help="folder in the coco layout; default: toy masks")
    parser.add_argument("--masks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--ngf", type=int, default=64)
    parser.add_argument("--out", type=Path, help="also write the result as JSON")
    arguments = parser.parse_args()

    conditions = masks(arguments.dataroot, arguments.masks)
    generator = settled_generator(conditions[0], arguments.ngf)
    backends = [name for name in ("reference", "cpu") if sk.build_info()["backends"][name] is None]  # type: ignore[index]
    providers = ["eager", *backends, "spade-free"]
    difference = check(generator, providers, conditions[0])
    rows = [len(mask.window_index((256, 256), 3).modulation) for mask in conditions]
    result = {
        "what": f"SPADEGenerator ngf {arguments.ngf}, 256 x 256, {conditions[0].channels} channels, batch 1, float32",
        "masks": f"{len(conditions)} of {'a coco folder' if arguments.dataroot else 'toy landscapes'}",
        "distinct windows at 256 x 256": round(sum(rows) / len(rows) / 256**2, 3),
        "largest difference from eager": difference,
        "eval, ms": measure(evaluate, generator, providers, conditions, arguments.repeats),
        "train forward + backward, ms": measure(
            train, generator, providers, conditions, max(1, arguments.repeats // 2)
        ),
        "device": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}",
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
