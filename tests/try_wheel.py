"""Tries the installed package, which must have its CPU kernels, and prints what it was tried on: for `make wheel`.

Not a test module: it runs where neither pytest nor a compiler is.
"""

from __future__ import annotations

import importlib.metadata
import platform
import re
import warnings

import torch

import spade_kernels as sk


def main() -> None:
    warnings.simplefilter("error", sk.MissingKernelsWarning)
    torch.manual_seed(0)
    layer = sk.SPADE("spadeinstance3x3", 8, 5).double()
    x = torch.randn(2, 8, 16, 16, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 5, (2, 32, 32))
    found = []
    for backend in ("cpu", "reference"):
        sk.use_backend(backend)
        y = layer(x, sk.LabelMap(labels, 5))
        found.append((y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted)
    about = importlib.metadata.distribution("spade-kernels").read_text("WHEEL") or ""
    tags = " ".join(re.findall("^Tag: (.*)$", about, re.MULTILINE))
    print(f"{tags}, Python {platform.python_version()}, torch {torch.__version__}: works")


if __name__ == "__main__":
    main()
