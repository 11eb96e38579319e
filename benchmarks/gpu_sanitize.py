"""Calls every CUDA C++ and Triton kernel on small shapes, for use with compute-sanitizer.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu_sanitize

The calls are recorded on the CPU, where their expected results are computed too, so that the GPU runs few other
kernels. The last line of output shows that the program reached its end, and the number of calls of each backend.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

import spade_kernels as sk
from benchmarks.gpu_suites.sanitizers import BACKENDS, END
from spade_kernels import backends, ops
from spade_kernels.functional import use_path
from spade_kernels.testing import random_label_map, random_spade, relative_error
from spade_model.benchmark.calls import Recorder

LIMIT = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
CLASSES = 7
# These are channels and side of x, upsample, norm and path. Some sizes permit loads of 16 bytes, others do not.
LAYERS = (
    (64, 24, 1, "batch", "windows"),
    (32, 17, 2, "instance", "windows"),
    (13, 9, 1, "instance", "windows"),
    (64, 12, 2, "batch", "dense"),
)
WINDOWS = (("constant", 3, 1), ("noise", 5, 1), ("noise", 3, 2))  # kind of mask, size, stride


@dataclass(frozen=True)
class Call:
    """A call of an operator with CPU tensors, and the results of the reference kernel."""

    where: str
    name: str
    func: Callable[..., Any]
    arguments: tuple
    dtype: torch.dtype
    expected: list[Tensor]


def calls() -> Iterator[Call]:
    """Yields the operator calls of a few layers, forward and backward, in each dtype, and calls of `window_index`."""
    for dtype in LIMIT:
        for layer in LAYERS:
            for name, (func, arguments) in recorded_layer(*layer).items():
                given = rounded(arguments, dtype)
                yield Call(f"{layer}", name, func, given, dtype, tree_leaves(func(*given)))
    for kind, kernel_size, stride in WINDOWS:
        mask = random_label_map(kind, (3, 33, 20), 200)
        with Recorder() as recorder:
            sizes = [(21, 20), (33, 40), (5, 5)]
            ops.window_index(mask.codes, sizes, kernel_size, stride, kernel_size // 2, levels=2)
        func, arguments = recorder.calls["window_index"]
        expected = tree_leaves(func(*arguments))
        yield Call(f"{kind}, {kernel_size}, {stride}", "window_index", func, arguments, torch.int64, expected)


def recorded_layer(channels: int, side: int, upsample: int, norm: str, path: str) -> dict[str, tuple]:
    """Returns a dict from the operators that a layer calls to (operator, arguments)."""
    mask = random_label_map("blobs", (2, side * upsample, side * upsample), CLASSES, edges=True)
    layer = random_spade(f"spade{norm}3x3", channels, CLASSES + 1).train()
    x = torch.randn(2, channels, side, side, requires_grad=True)
    with torch.enable_grad(), Recorder() as recorder, use_path(path):
        y = layer(x, mask, negative_slope=0.2, upsample=upsample)
        y.backward(torch.randn_like(y))
        mean, m2 = ops.channel_stats(x)
        (mean.square().sum() + m2.sum()).backward()
        ops.pack_modulation_weight(layer.mlp_gamma.weight, layer.mlp_beta.weight)
    # The convolution operators have no kernels for GPUs.
    return {name: call for name, call in recorder.first_calls().items() if not name.startswith("conv")}


def rounded(arguments: tuple, dtype: torch.dtype) -> tuple:
    """Converts activations, weights, tables and their gradients to `dtype`; other float tensors stay float32."""

    def change(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        # Biases have one dimension, and statistics have two rows, one per image; both stay float32.
        narrow = value.dtype == torch.float32 and (value.dim() == 4 or (value.dim() > 1 and len(value) > 2))
        return value.detach().to(dtype) if narrow else value.detach()

    return tree_map(change, arguments)


def check(call: Call, device: torch.device) -> None:
    """Raises AssertionError if the results on the device differ from the expected ones by more than LIMIT."""
    moved = tree_map(lambda value: value.to(device) if isinstance(value, Tensor) else value, call.arguments)
    for got, expected in zip(tree_leaves(call.func(*moved)), call.expected, strict=True):
        if expected.is_floating_point():
            error = relative_error(got.cpu(), expected)
            assert error <= LIMIT[call.dtype], f"{call.name} {call.where} {call.dtype}: relative error {error}"
        else:
            assert torch.equal(got.cpu(), expected), f"{call.name} {call.where}: integer results differ"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    device = torch.device(parser.parse_args(argv).device)
    torch.manual_seed(0)
    names = BACKENDS if device.type == "cuda" else (device.type,)
    counts: dict[str, Counter[str]] = {name: Counter() for name in names}
    with torch.no_grad():
        sk.use_backend("reference")
        every = list(calls())
        for backend in names:
            if reason := sk.build_info()["backends"][backend]:  # type: ignore[index]
                print(f"{backend}: not run: {reason}", file=sys.stderr)
                continue
            sk.use_backend(backend)
            own = backends.kernels_on(device.type)
            for call in every:
                if own[call.name] == backend:
                    check(call, device)
                    counts[backend][call.name] += 1
            print(f"{backend}: {', '.join(f'{name} {count}' for name, count in counts[backend].items())}", flush=True)
    sk.use_backend("auto")
    print(END, ", ".join(f"{name} {counted.total()}" for name, counted in counts.items()), flush=True)
    return int(not all(counts.values()))


if __name__ == "__main__":
    sys.exit(main())
