"""Calls of everything public with one argument or attribute replaced by odd values, each in a process of its own.

    python tests/public_fuzz.py [--calls 300] [--backend cpu]

Such a call may return or raise, but not end its process. Prints the calls that did, and a summary.
"""

from __future__ import annotations

import argparse
import copy
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from calls_in_processes import RAISED, RETURNED, outcome
from torch import nn

import spade_kernels as sk
from spade_kernels import condition, functional, normalization, ops
from spade_kernels.convolution import Conv2d
from spade_kernels.windows import Windows

LABELS = torch.randint(5, (2, 8, 8), generator=torch.Generator().manual_seed(0))
PLANES = torch.randn(2, 5, 8, 8, generator=torch.Generator().manual_seed(0))
X = PLANES.repeat(1, 4, 1, 1)[:, :16]
MAP = sk.LabelMap(LABELS, 5)
INDEX = MAP.prepare([(8, 8)]).window_index((8, 8), 3)
LAYER = sk.SPADE("spadebatch3x3", 16, 5)
CONV = Conv2d(16, 32, 3, padding=1, spectral=True)


def _freed(t: torch.Tensor) -> torch.Tensor:
    t = t.clone()
    t.untyped_storage().resize_(0)
    return t


ODD: dict[str, Any] = {
    **{repr(value): value for value in (None, True, 0, 1, -1, 3, 2**31, 2**62, 0.5, float("nan"), "x", b"", object)},
    **{repr(value): value for value in ([], (8,), (8, 8), (0, 8), (-3, 8), (2**20, 2**20), (8.0, 8), [(4, 4)], {})},
    **{repr(value): value for value in (torch.float16, torch.int32, slice(5, 9), slice(None), "cpu", "meta")},
    "labels": LABELS,
    "larger labels": LABELS.repeat(1, 3, 2),
    "huge labels": LABELS + 2**40,
    "int32 labels": LABELS.int(),
    "boolean labels": LABELS.bool(),
    "float labels": LABELS.float(),
    "no labels": LABELS[:0],
    "one label": LABELS[0, 0, 0],
    "x": X,
    "x as float64": X.double(),
    "x as complex": X + 0j,
    "one image": X[:1],
    "one pixel": X[..., :1, :1],
    "no pixels": X[..., :0],
    "no channels": X[:, :0],
    "a vector": X[0, :, 0, 0],
    "a longer vector": X.flatten(),
    "nothing": X.new_empty(0),
    "meta x": X.to("meta"),
    "sparse x": X.to_sparse(),
    "transposed x": X.mT,
    "mkldnn x": X.to_mkldnn(),
    "quantized x": torch.quantize_per_tensor(X, 0.1, 0, torch.qint8),
    "a label map": MAP,
    "a larger label map": sk.LabelMap(LABELS.repeat(1, 2, 2), 5),
    "a label map of more classes": sk.LabelMap(LABELS, 9),
    "a pooled label map": MAP.avg_pool(),
    "two tensors": (X, X),
    "two vectors": (X[0, :, 0, 0], X[0, :, 0, 0]),
    "a convolution": nn.Conv2d(5, 7, 3),
    "a layer": LAYER,
}

# Only where the package reads labels or x: PyTorch's own operators read them as they are.
FREED = {"labels": _freed(LABELS), "planes": _freed(PLANES), "x": _freed(X), "segmap": _freed(PLANES)}

STATS = normalization.statistics(nn.BatchNorm2d(16), X)
WEIGHTS = LAYER._weights()
TABLE = functional.modulation_table(LABELS, X.shape[2:], WEIGHTS)
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "LabelMap": (sk.LabelMap, {"labels": LABELS, "num_labels": 5, "edges": None, "ignore_index": None}),
    "LabelMap.windows": (MAP.windows, {"size": (8, 8), "kernel_size": 3, "stride": 1, "padding": 1}),
    "LabelMap.window_index": (MAP.window_index, {"size": (4, 4), "kernel_size": 3}),
    "LabelMap.prepare": (MAP.prepare, {"sizes": [(4, 4)], "kernel_size": 3, "gradients": True}),
    "LabelMap.codebook_matmul": (MAP.codebook_matmul, {"rows": torch.randn(5, 3)}),
    "LabelMap.codebook": (MAP.codebook, {"dtype": torch.float32}),
    "LabelMap.one_hot": (MAP.one_hot, {"dtype": torch.float32}),
    "LabelMap.to": (MAP.to, {"device": "cpu", "non_blocking": False}),
    "LabelMap.__getitem__": (MAP.__getitem__, {"images": slice(1)}),
    "LabelMap.cat": (sk.LabelMap.cat, {"maps": [MAP, MAP]}),
    "LabelMap.from_one_hot": (sk.LabelMap.from_one_hot, {"planes": MAP.one_hot(), "edges": False}),
    "StaticLabelMap": (sk.StaticLabelMap, {"example": MAP}),
    "StaticLabelMap.copy_": (lambda other: sk.StaticLabelMap(MAP).copy_(other), {"other": MAP}),
    "instance_edges": (sk.instance_edges, {"instances": LABELS}),
    "freeze": (sk.freeze, {"module": LAYER}),
    "SPADE": (sk.SPADE, {"config_text": "spadebatch3x3", "norm_nc": 16, "label_nc": 5}),
    "SPADE.forward": (
        lambda **arguments: LAYER(**arguments).sum().backward(),
        {"x": X, "segmap": MAP, "negative_slope": 1.0, "gain": None, "upsample": 1, "moments": None},
    ),
    "SyncBatchNorm2d": (sk.SyncBatchNorm2d(16), {"input": X}),
    "Conv2d": (CONV, {"x": X, "weight": None, "add": None}),
    "functional.spade": (
        functional.spade,
        {
            "x": X,
            "segmap": LABELS,
            "norm": STATS,
            "weights": WEIGHTS,
            "negative_slope": 1.0,
            "upsample": 1,
            "packed": None,
        },
    ),
    "functional.modulation_table": (
        functional.modulation_table,
        {"segmap": LABELS, "size": (4, 4), "weights": WEIGHTS, "x_dtype": None, "gain": None, "packed": None},
    ),
    "functional.modulate": (
        functional.modulate,
        {"x": X, "stats": STATS, "table": TABLE, "negative_slope": 1.0, "upsample": 1},
    ),
    "condition.conv2d": (
        condition.conv2d,
        {"segmap": MAP, "weight": torch.randn(4, 5, 3, 3), "bias": None, "stride": 1, "padding": 1, "size": (8, 8)},
    ),
    "condition.as_condition": (condition.as_condition, {"segmap": MAP, "channels": 5, "like": X}),
    "normalization.statistics": (
        lambda **arguments: normalization.statistics(nn.BatchNorm2d(16), **arguments),
        {"x": X, "taken": None, "upsample": 1},
    ),
    "normalization.moments": (lambda x: normalization.moments(nn.BatchNorm2d(16), x), {"x": X}),
    "ops.modulate": (ops.modulate, {"x": X, "mean": STATS.mean, "rstd": STATS.rstd, "table": torch.randn(128, 32)}),
    "Windows": (
        lambda **arguments: [Windows(**arguments).tap_segments, Windows(**arguments).row_segments],
        {name: getattr(INDEX.hidden, name) for name in ("windows", "pixel_row", "image_offsets", "num_ids")},
    ),
    "Windows.padded": (INDEX.hidden.padded, {"rows": 1000, "num_ids": 7}),
    "use_backend": (sk.use_backend, {"name": "auto"}),
}
# Attributes that users replace, of what is called afterwards.
ATTRIBUTES = {
    "SPADE": (
        LAYER,
        lambda layer: layer(X, MAP),
        [
            *(f"{conv}.{part}" for conv in ("mlp_shared.0", "mlp_gamma", "mlp_beta") for part in ("weight", "bias")),
            *(f"param_free_norm.{part}" for part in ("running_mean", "running_var", "eps", "momentum")),
            *("mlp_gamma.padding", "mlp_gamma", "mlp_shared", "param_free_norm", "norm_nc", "label_nc"),
        ],
    ),
    "Conv2d": (CONV, lambda conv: conv(X), ["weight_orig", "weight_u", "weight_v", "bias", "padding"]),
    "LabelMap": (MAP, lambda label_map: LAYER(X, label_map), ["codes", "labels", "num_labels", "edges"]),
    "Windows": (
        INDEX.hidden,
        lambda windows: windows.tap_segments,
        ["windows", "pixel_row", "image_offsets", "num_ids"],
    ),
}


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    for name, (function, arguments) in CALLS.items():
        yield name, lambda function=function, arguments=arguments: function(**arguments)
        for argument in arguments:
            freed = {"a freed tensor": FREED[argument]} if argument in FREED and name != "Conv2d" else {}
            for what, value in {**ODD, **freed}.items():

                def call(function=function, changed={**arguments, argument: value}):  # noqa: B006
                    function(**changed)

                yield f"{name}, {argument}: {what}", call
    for name, (target, use, attributes) in ATTRIBUTES.items():
        for attribute in attributes:
            for what, value in ODD.items():
                for mode in ("training", "evaluation", "frozen"):
                    call = _with_attribute(target, use, attribute, value, mode)
                    yield f"{name}.{attribute} = {what}, {mode}", call


def _with_attribute(target: Any, use: Callable, attribute: str, value: Any, mode: str) -> Callable[[], Any]:
    def call() -> Any:
        changed = copy.deepcopy(target)
        *path, last = attribute.split(".")
        owner = changed.get_submodule(".".join(path)) if path else changed
        if isinstance(getattr(owner, last), nn.Parameter) and isinstance(value, torch.Tensor):
            setattr(owner, last, nn.Parameter(value, requires_grad=value.is_floating_point()))
        else:
            setattr(owner, last, value)
        if isinstance(changed, nn.Module) and mode != "training":
            changed.eval()
        if isinstance(changed, nn.Module) and mode == "frozen":
            sk.freeze(changed)
        with torch.set_grad_enabled(mode == "training"):
            return use(changed)

    return call


def _returns(call: Callable[[], Any]) -> int:
    call()
    return RETURNED


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, help="so many, chosen at random; all of them otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # A child must not need the threads of its parent.
    torch.set_num_threads(1)
    sk.use_backend(options.backend)
    every = list(calls())
    if options.calls:
        every = random.Random(options.seed).sample(every, min(options.calls, len(every)))
    counts: Counter[str] = Counter()
    for what, call in every:
        status = outcome(lambda call=call: _returns(call))
        verdict = {RETURNED: "returned", RAISED: "raised"}.get(status, "ended the process")
        counts[verdict] += 1
        if verdict == "ended the process":
            print(f"{what}: {verdict} ({status})", flush=True)
    kinds = ("returned", "raised", "ended the process")
    print(f"{len(every)} calls: " + ", ".join(f"{counts[kind]} {kind}" for kind in kinds))
    return 1 if counts["ended the process"] else 0


if __name__ == "__main__":
    sys.exit(main())
