"""The strict interpreter refuses what it should, so that the other tests show what they seem to."""

from __future__ import annotations

import os

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="not the interpreter")


@triton.jit
def _copy(source, target, READ: tl.constexpr, WRITTEN: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(target + i, tl.load(source + i, i < READ, other=0), i < WRITTEN)


@triton.jit
def _product(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = i[:, None] * BLOCK + i[None, :]
    tl.store(out + at, tl.dot(tl.load(a + at), tl.load(b + at)))


@pytest.mark.parametrize(("read", "written", "fault"), [(4, 4, None), (5, 4, "reads 1 of 5"), (4, 6, "writes 2 of 6")])
def test_accesses_outside_of_tensors(read, written, fault):
    source, _, target, _ = torch.arange(16.0).split(4)  # with memory of theirs on both sides, as a process has it
    if fault is None:
        _copy[(1,)](source, target, read, written, 8)
        assert torch.equal(source, target)
    else:
        with pytest.raises(triton.runtime.errors.InterpreterError, match=fault):
            _copy[(1,)](source, target, read, written, 8)


def test_products_of_bfloat16():
    a, b, out = (torch.randn(16, 16, dtype=torch.bfloat16) for _ in range(3))
    out = out.float()
    _product[(1,)](a, b, out, 16)
    torch.testing.assert_close(out, a.float() @ b.float())
