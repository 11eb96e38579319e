"""Puts layers through Triton's launcher as on a GPU, up to the launch: a driver stands in that launches nothing.

Run as a program: prints the kernels that were launched, and fails where the launcher specializes one otherwise than
`spade_kernels.triton.variants` foretells, or where what it asks for does not compile.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import warnings
from collections import Counter
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

import spade_kernels.triton
from spade_kernels import backends, functional, ops
from spade_kernels.testing import forward_backward, random_label_map, random_spade
from spade_kernels.triton import variants

CLASSES = 3
# The layers: config, channels, batch, size of x, upsample, path, dtype. Sizes of 1 become constants when compiled.
LAYERS = (
    ("spadebatch3x3", 1, 2, (1, 1), 1, "windows", torch.float32),
    ("spadebatch1x1", 1, 3, (1, 16), 2, "dense", torch.bfloat16),
    ("spadebatch3x3", 64, 2, (16, 16), 2, "windows", torch.bfloat16),
    ("spadebatch3x3", 20, 2, (4, 5), 1, "dense", torch.float16),
    ("spadeinstance3x3", 20, 2, (31, 33), 1, "windows", torch.float64),
)

launched: list[tuple[str, Any]] = []


class _Driver:
    """Answers what Triton asks of a driver as one H100 would."""

    class launcher_cls:
        def __init__(self, src, metadata):
            self.src = src

        def __call__(self, *arguments):
            launched.append((self.src.name, self.src))

    class utils:
        @staticmethod
        def get_device_properties(device):
            return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132, "warpSize": 32}

        @staticmethod
        def load_binary(name, kernel, shared, device):
            module, function, registers, spilled, most_threads = 1, 1, 32, 0, 1024
            return module, function, registers, spilled, most_threads

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def launch(kernel, grid, *arguments, num_warps=4, num_stages=3, **constexprs) -> None:
    """`variants.launch`, compared with what `variants` says of it."""
    if not all(grid):
        return
    expected = variants._variant(kernel, arguments, constexprs, num_warps, num_stages)
    _launch(kernel, grid, *arguments, num_warps=num_warps, num_stages=num_stages, **constexprs)
    name, source = launched[-1]
    signature = {key: kind for key, kind in source.signature.items() if kind != "constexpr"}
    constants = {source.fn.arg_names[i]: value for (i,), value in source.constants.items()}
    divisible = {source.fn.arg_names[i] for (i,), what in source.attrs.items() if ["tt.divisibility", 16] in what}
    assert signature == expected.signature, (name, signature, expected.signature)
    assert divisible == set(expected.divisible), (name, divisible, expected.divisible)
    assert constants == expected.constexprs, (name, constants, expected.constexprs)


_launch, _table_dtype = variants.launch, functional._table_dtype


def main() -> None:
    driver.set_active(_Driver())
    for module in pkgutil.iter_modules(spade_kernels.triton.__path__, f"{spade_kernels.triton.__name__}."):
        if hasattr(loaded := importlib.import_module(module.name), "launch") and loaded is not variants:
            loaded.launch = launch  # type: ignore[attr-defined]
    library = torch.library.Library("spade_kernels", "IMPL")
    warnings.filterwarnings("ignore", message=".*verrid", category=UserWarning)
    for name in backends.operators_of("triton"):
        library.impl(name, backends._python_kernel(name, "triton"), "CPU", allow_override=True)
    # On a GPU tensor cores multiply tables of a bfloat16 x.
    functional._table_dtype = lambda x_dtype, weight: (
        x_dtype if x_dtype == torch.bfloat16 else _table_dtype(x_dtype, weight)
    )
    for config, channels, batch, size, upsample, path, dtype in LAYERS:
        layer = random_spade(config, channels, CLASSES).to(dtype)
        mask = random_label_map("blobs", (batch, *size), CLASSES)
        x = torch.randn(batch, channels, *size, dtype=dtype)
        grad = torch.randn(batch, channels, *(upsample * side for side in size))
        with functional.use_path(path):
            forward_backward(lambda x: layer(x, mask, 0.2, upsample=upsample), layer, x, grad)  # noqa: B023
        sum(ops.channel_stats(x.requires_grad_())).sum().backward()
    print(json.dumps(Counter(name for name, _ in launched)))


if __name__ == "__main__":
    main()
