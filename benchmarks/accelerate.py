"""Times models of other repositories as they are, accelerated by `sk.accelerate`, and also frozen by `sk.freeze`.

    python -m benchmarks.accelerate [--dataroot folder] [--repeats 5] [--out folder] [--tiny]

The models have the structure of the real ones (spade_model/benchmark/others.py) and random weights. All versions of a
model are timed in turn within one run. Each call gets another mask in a new tensor, so that nothing is known of it
beforehand; only the steps of a sampler share one. The result file holds medians; the table shows their ratios.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch._inductor import config as inductor_config

import spade_kernels as sk
from spade_kernels import LabelMap
from spade_model.benchmark import others
from spade_model.benchmark.clock import interleave
from spade_model.benchmark.environment import environment
from spade_model.benchmark.masks import bench_masks, coco_or_toy
from spade_model.benchmark.results import BenchRun, Result, file_name, save_runs

EVAL, TRAINING, SAMPLING = "eval", "forward + backward", "50 sampler steps"
STEPS = 50

MASKS = 5

Call = Callable[[nn.Module, Tensor], object]
Case = tuple[str, nn.Module, Call, tuple[str, ...]]


def cases(channels: int, tiny: bool) -> Iterator[Case]:
    """Yields each model's name, the model, a function that calls it with a mask, and the suites in which it is timed.

    Args:
        channels: of the mask.
    """
    ngf = 4 if tiny else 64
    yield "NVlabs generator", others.Generator(channels, ngf), lambda m, mask: m(mask), (EVAL, TRAINING)
    yield "OASIS generator", others.Generator(channels, ngf, noise=64), lambda m, mask: m(mask), (EVAL, TRAINING)
    feature = torch.randn(1, 16, 8, 8) if tiny else torch.randn(1, 256, 64, 64)
    decoder = others.Decoder(16, 8) if tiny else others.Decoder()
    yield "LivePortrait decoder", decoder, lambda m, _: m(feature), (EVAL,)
    diffusion = others.DiffusionLayers(channels, 32 if tiny else 256)
    inputs = diffusion.inputs()
    # The sampler multiplies the mask by 0 or 1 in every step, for its guidance, which makes a new tensor.
    yield "semantic diffusion layers", diffusion, lambda m, mask: m(inputs, mask * 1), (EVAL, SAMPLING)
    x = torch.randn(1, 16 if tiny else 256, 128, 128)
    yield "MONAI layer", others.NormedLayer(x.shape[1], channels), lambda m, mask: m(x, mask), (EVAL, TRAINING)


def providers(model: nn.Module, suite: str, call: Call) -> dict[str, Callable[[dict[str, Tensor]], object]]:
    """Returns one function per version of the model. It runs a forward, and in training also a backward.

    Its argument has a mask for each version.
    """
    model = model.train(suite == TRAINING)
    accelerated = copy.deepcopy(model)
    report = sk.accelerate(accelerated, strict=True)
    assert report.replaced
    found = {"eager": model, "accelerated": accelerated}
    if suite != TRAINING:
        found["accelerated, frozen"] = copy.deepcopy(accelerated)
        sk.freeze(found["accelerated, frozen"])
    runs = {name: _run(name, one, suite, call) for name, one in found.items()}
    if suite == EVAL and isinstance(model, others.Decoder):
        compiled = torch.compile(copy.deepcopy(model))
        runs["compiled"] = inductor_config.patch(freezing=True)(_run("compiled", compiled, suite, call))
    return runs


def _run(name: str, model: nn.Module, suite: str, call: Call) -> Callable[[dict[str, Tensor]], object]:
    def run(masks: dict[str, Tensor]) -> object:
        mask = masks.pop(name)
        if suite == TRAINING:
            model.zero_grad(set_to_none=True)
            y = call(model, mask)
            assert isinstance(y, Tensor)
            return y.sum().backward()
        with torch.no_grad():
            for _ in range(STEPS if suite == SAMPLING else 1):
                y = call(model, mask)
        return y

    return run


def measure(masks: Sequence[LabelMap], repeats: int, tiny: bool) -> Iterator[Result]:
    planes = [mask.one_hot().contiguous() for mask in masks]
    for case, model, call, suites in cases(masks[0].channels, tiny):
        model.train()
        with torch.no_grad():
            call(model, planes[0])  # One forward in training mode brings the spectral norms of new weights near theirs.
        for suite in suites:
            runs = providers(model, suite, call)

            def fresh(count: int, names: Collection[str]) -> list[dict[str, Tensor]]:
                return [{name: planes[i % len(planes)].clone() for name in names} for i in range(count)]

            interleave(runs, fresh(1, runs), 1)  # torch.compile compiles in the first call.
            times = interleave(runs, fresh(1 if suite == SAMPLING and not tiny else repeats, runs), 1)
            yield from (Result.of(suite, case, name, values) for name, values in times.items())


def table(results: list[Result]) -> str:
    """Returns the ratios of medians as a markdown table."""
    found = {(r.case, r.suite, r.provider): r.p50 for r in results}
    lines = [
        "| model | suite | eager, ms | eager / accelerated | eager / frozen | compiled / frozen |",
        "|---|---|---|---|---|---|",
    ]
    for case, suite in dict.fromkeys((r.case, r.suite) for r in results):
        eager = found[case, suite, "eager"]
        ours, frozen = found[case, suite, "accelerated"], found.get((case, suite, "accelerated, frozen"))
        compiled = found.get((case, suite, "compiled"))
        ratios = [eager / ours, frozen and eager / frozen, compiled and frozen and compiled / frozen]
        lines.append(
            f"| {case} | {suite} | {eager:.0f} | " + " | ".join(f"{r:.2f}" if r else "" for r in ratios) + " |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataroot", default="", help="folder of masks in the coco layout; default: toy landscapes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder in which the result file is written")
    parser.add_argument("--tiny", action="store_true", help="use small models, to test this script")
    arguments = parser.parse_args(argv)
    kinds = bench_masks(coco_or_toy(arguments.dataroot, 128 if arguments.tiny else 256), MASKS, every_kind=False)
    ((kind, masks),) = kinds.items()
    torch.manual_seed(0)
    results = list(measure(masks, arguments.repeats, arguments.tiny))
    print(table(results))
    if arguments.out:
        where = environment()
        path = arguments.out / ("accelerate-" + file_name("{device} {threads} threads".format(**where)))
        save_runs(
            [BenchRun(where, {"masks": f"{len(masks)} {kind}", "condition channels": masks[0].channels}, results)], path
        )
        print(f"written to {path}")


if __name__ == "__main__":
    main()
