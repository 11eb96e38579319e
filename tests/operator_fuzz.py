"""Calls of every operator with one argument changed, each in a process of its own.

    python tests/operator_fuzz.py [--calls 300] [--backend cpu]

A call ends its process, raises or returns. No call may do the first, and no call with an invalid argument the last.
Which arguments are valid is written down here once more, independently of the checks. Prints what was wrong, and a
summary; the exit status is 1 if anything was.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from calls_in_processes import RAISED, RETURNED, outcome
from test_ops import OPS, H, N, Problem, W
from torch import Tensor

import spade_kernels as sk
from spade_kernels import backends

_DIFFERS = 12
_VERDICTS = {RETURNED: "returned", RAISED: "raised", _DIFFERS: "returned another result"}

_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_NO_FLOATS = (torch.int64, torch.int32, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn)
_NO_INDICES = (torch.int32, torch.int16, torch.uint8, torch.bool, torch.float32, torch.float64)
_INDEX_NAMES = ("ids", "windows", "pixel_row", "indices")
_BOUNDS_NAMES = ("offsets", "image_offsets")

# By operator and argument, the sizes that no other argument fixes: of which dimensions, from which to which.
_SOME, _ANY = range(1, 2**62), range(2**62)
_FREE = {
    ("window_index", "ids"): dict.fromkeys((0, 1, 2), _SOME),
    ("channel_stats", "x"): dict.fromkeys((0, 1, 2, 3), _SOME),
    ("channel_stats_grad", "x"): dict.fromkeys((2, 3), _SOME),
    ("pack_conv_weight", "weight"): dict.fromkeys((0, 1), _SOME),
    ("conv", "packed_weight"): {0: range(1, 2)},
    ("conv 1x1", "x"): {0: _ANY, 2: _SOME, 3: _SOME},
    ("conv 1x1", "bias"): {0: range(1, 33)},
    ("conv3x3", "x"): {0: _ANY, 2: _SOME, 3: _SOME},
    ("conv3x3_input_grad", "grad"): {0: _ANY, 2: _SOME, 3: _SOME},
    ("conv3x3_input_grad", "weight"): {1: _SOME},
    ("conv3x3_weight_grad", "grad"): {1: _SOME},
    ("conv3x3_weight_grad", "x"): {1: _SOME},
    ("modulate_conv", "table"): {0: range(N * H * W, 2**62)},
    ("modulate_conv", "packed_weight"): {0: range(1, 2)},
    ("modulate_input_grad", "table"): {0: range(N * H * W, 2**62)},
}
# The calls that are valid without one of their arguments. Where all windows differ, as here, the table without
# pixel_row is that of a dense condition.
_OPTIONAL = {
    *(("gather_sum", "bias"), ("conv", "add"), ("modulate_conv", "add"), ("modulate", "image_offsets")),
    *(("modulate_conv", "pixel_row"), ("modulate_input_grad", "pixel_row")),
}
_NUMBERS: dict[str, tuple[list, list]] = {  # valid and invalid ones
    "kernel_size": ([1, 2], [0, -1, 100, 2**31, 2**62, -(2**63)]),
    "stride": ([2, 5], [0, -1, 2**31, 2**62, -(2**63)]),
    "padding": ([2, 7], [-1, -3, 2**31, 2**62, -(2**63)]),
    "levels": ([1], [0, -1, 3, 2**31, 2**62]),
    "num_taps": ([], [0, -1, 4, 1, 2**31, 2**62]),
    "upsample": ([], [0, -1, 2, 3, 2**31, 2**62]),
    "negative_slope": ([0.0, -1.0, float("nan"), float("inf")], []),
    "relu": ([True, False], []),
    "stats_scope": (["none", "image", "batch", "group:1"], ["", "images", "no\0ne", "group:", "group:0", "group:977"]),
    "sizes": ([[1, 1], [64, 2], []], [[5], [5, 4, 3], [0, 4], [5, -1], [2**20, 2**20], [2**62, 2], [-(2**63), 4]]),
}


_SAME = ("strided", "with an offset", "transposed in memory", "with odd strides")


class Call(NamedTuple):
    op: str
    what: str
    original: list
    changed: Callable[[], list]
    valid: bool

    @property
    def is_same(self) -> bool:
        """True if the arguments differ from the original ones in their layout only."""
        return self.what.endswith(_SAME)


def calls(dtype: torch.dtype) -> Iterator[Call]:
    """Every operator with every argument changed in every way."""
    for op in OPS:
        original = _arguments(op, dtype)
        names = [argument.name for argument in _operator(op)._schema.arguments]
        yield Call(op, "unchanged", original, lambda original=original: original, True)
        for i, name in enumerate(names):
            for what, changed, valid in _changes(op, name, original, i):

                def build(original=original, i=i, changed=changed) -> list:
                    return [*original[:i], changed(), *original[i + 1 :]]

                yield Call(op, f"{name}: {what}", original, build, valid)


def _arguments(op: str, dtype: torch.dtype) -> list:
    torch.manual_seed(0)

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return [cast(value) for value in Problem().arguments(op)]


def _operator(op: str) -> Any:
    return getattr(torch.ops.spade_kernels, op.split()[0]).default


def _changes(op: str, name: str, arguments: list, i: int) -> Iterator[tuple[str, Callable[[], Any], bool]]:
    value = arguments[i]
    if not isinstance(value, Tensor):
        if name in _NUMBERS:
            for valid, numbers in zip((True, False), _NUMBERS[name], strict=True):
                yield from ((repr(number), lambda number=number: number, valid) for number in numbers)
        yield "a tensor", lambda: torch.zeros(3, 1, 2), False
        yield "a string", lambda: "1", False
        return
    yield "left out", lambda: None, (op, name) in _OPTIONAL
    yield "a number", lambda: 1, False
    yield from _changes_of_dtype(value)
    yield from _changes_of_shape(op, name, value)
    yield from _changes_of_memory(value)
    # A result on the meta device needs no values, but the number of windows does.
    alone = sum(isinstance(a, Tensor) for a in arguments) == 1 and op != "window_index"
    yield "without values", lambda: value.to("meta"), alone
    if name in _INDEX_NAMES:
        yield from _changes_of_indices(name, value, _limit(name, arguments, op))
    if name in _BOUNDS_NAMES:
        yield from _changes_of_bounds(value)


def _changes_of_dtype(value: Tensor):
    floating = value.is_floating_point()
    for dtype in _FLOATS if floating else ():
        yield str(dtype), lambda dtype=dtype: value.to(dtype), True
    for dtype in _NO_FLOATS if floating else _NO_INDICES:
        yield str(dtype), lambda dtype=dtype: value.to(dtype), False


def _changes_of_shape(op: str, name: str, value: Tensor):
    free = _FREE.get((op, name), {})
    for d, size in enumerate(value.shape):
        for changed in {0, 1, size - 1, size + 1, 3 * size} - {size}:
            index = torch.arange(changed) % size
            valid = changed in free.get(d, ())
            yield f"dimension {d} of size {changed}", lambda d=d, index=index: value.index_select(d, index), valid
    for what, changed in (
        ("one dimension more", value.unsqueeze(0)),
        ("one more at the end", value.unsqueeze(-1)),
        ("one dimension less", value[0]),
        ("a scalar", value.flatten()[0]),
        ("empty", value.new_empty(0)),
        ("flattened", value.flatten()),
    ):
        if changed.shape != value.shape:
            yield what, lambda changed=changed: changed, False


def _changes_of_memory(value: Tensor):
    def strided() -> Tensor:
        return value.repeat_interleave(2, -1)[..., ::2]

    def from_offset() -> Tensor:
        return torch.cat((value.flatten()[:1], value.flatten()))[1:].view(value.shape)

    def resized(bytes_: int) -> Tensor:
        copy = value.clone()
        copy.untyped_storage().resize_(bytes_)
        return copy

    def with_odd_strides() -> Tensor:
        strides = [10**9 if size == 1 else stride for size, stride in zip(value.shape, value.stride(), strict=True)]
        return value.as_strided(value.shape, strides)

    if 1 in value.shape:
        yield "with odd strides", with_odd_strides, True
    yield "strided", strided, True
    yield "with an offset", from_offset, True
    yield "transposed in memory", lambda: value.mT.contiguous().mT if value.dim() > 1 else value, True
    if value.is_floating_point():
        yield "expanded", lambda: value.flatten()[0].expand(value.shape), True
    yield "freed", lambda: resized(0), False
    yield "cut short", lambda: resized(value.nbytes - 1), False
    yield "sparse", value.to_sparse, False


def _limit(name: str, arguments: list, op: str) -> tuple[int, int]:
    schema = [argument.name for argument in _operator(op)._schema.arguments]
    by_name = dict(zip(schema, arguments, strict=True))
    if name == "ids":
        return 1, 2**32
    if name == "windows":
        return (0, len(by_name["tap_responses"])) if "tap_responses" in by_name else (0, len(by_name["hidden"]) + 1)
    return (0, len(by_name["table"])) if name == "pixel_row" else (0, by_name["indices"].numel())


def _changes_of_indices(name: str, value: Tensor, limit: tuple[int, int]):
    low, high = limit

    def with_value(position: int, number: int) -> Tensor:
        copy = value.clone()
        copy.view(-1)[position] = number
        return copy

    for position in (0, value.numel() // 2, -1):
        for number in (low, high - 1):
            yield f"{number} at {position}", lambda p=position, n=number: with_value(p, n), True
        for number in (low - 1, high, -(2**63), 2**63 - 1, 2**62 + 1, -(2**40)):
            if number != high or high <= 2**32:
                yield f"{number} at {position}", lambda p=position, n=number: with_value(p, n), False


def _changes_of_bounds(value: Tensor):
    def with_value(position: int, number: int) -> Tensor:
        copy = value.clone()
        copy[position] = number
        return copy

    last = int(value[-1])
    for position, number in (
        *((0, n) for n in (1, -1, last)),
        *((len(value) // 2, n) for n in (-1, last + 1, 2**62, -(2**63))),
        *((-1, n) for n in (-1, last + 1, 2**62)),
    ):
        yield f"{number} at {position}", lambda p=position, n=number: with_value(p, n), False
    yield "descending", lambda: value.flip(0), False


Same = Callable[[Tensor, Tensor], bool]


def _make(call: Call, same: Same) -> int:
    # Whatever a result holds must be there to be read.
    found = [t.clone() for t in _results(call.op, call.changed())]
    if call.is_same and not all(map(same, found, _results(call.op, call.original))):
        return _DIFFERS
    return RETURNED


def _results(op: str, arguments: list) -> list[Tensor]:
    found = _operator(op)(*arguments)
    return list(found) if isinstance(found, (tuple, list)) else [found]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, help="so many, chosen at random; all of them otherwise")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--library", help="a shared library whose operators are to take the place of the CPU's")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    # A child must not need the threads of its parent.
    torch.set_num_threads(1)
    sk.use_backend(options.backend)
    if options.library:
        torch.ops.load_library(options.library)
    every = [call for dtype in (torch.float32, torch.float64) for call in calls(dtype)]
    assert {call.op.split()[0] for call in every} == set(backends.kernels_on("cpu"))
    if options.calls:
        every = random.Random(options.seed).sample(every, min(options.calls, len(every)))
    counts: Counter[str] = Counter()
    # Stock operators sum up in an order that depends on the layout.
    same: Same = torch.allclose if options.backend == "reference" else torch.equal
    for call in every:
        status = outcome(lambda call=call: _make(call, same))
        verdict = _VERDICTS.get(status, "ended the process")
        counts[verdict] += 1
        if verdict != ("returned" if call.valid else "raised"):
            counts["wrong"] += 1
            print(f"{call.op}, {call.what}: {verdict} ({status}), {'valid' if call.valid else 'invalid'}", flush=True)
    print(f"{len(every)} calls: " + ", ".join(f"{counts[kind]} {kind}" for kind in ("returned", "raised", "wrong")))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
