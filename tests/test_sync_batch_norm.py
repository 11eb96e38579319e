"""Two processes with unequal shares of a batch compute what one process computes over all of it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch import Tensor, nn

from spade_kernels import SPADE, LabelMap, SyncBatchNorm2d
from spade_kernels.testing import forward_backward, random_label_map, random_spade, relative_error

SHARES = (slice(0, 1), slice(1, 4))
CHANNELS, CLASSES = 6, 5
CASES = ("affine", "not affine", "cumulative average", "eval", "spade, label map", "spade, dense")


def build(case: str) -> nn.Module:
    if case.startswith("spade"):
        return random_spade("spadesyncbatch3x3", CHANNELS, CLASSES).double()
    norm = SyncBatchNorm2d(CHANNELS, affine=case != "not affine", momentum=None if "average" in case else 0.1).double()
    if norm.affine:
        nn.init.uniform_(norm.weight, 0.5, 2)
        nn.init.normal_(norm.bias)
    return norm.train(case != "eval")


def condition(case: str) -> LabelMap | Tensor:
    label_map = random_label_map("blobs", (4, 12, 9), CLASSES)
    return label_map.one_hot(torch.float64) + 0.5 if "dense" in case else label_map


def compute(case: str, share: slice) -> dict[str, Tensor]:
    """Output, gradients and running statistics of the images in `share`, after two passes."""
    torch.manual_seed(0)
    module, segmap = build(case), condition(case)[share]
    run = (lambda x: module(x, segmap)) if isinstance(module, SPADE) else module
    for _ in range(2):
        x, grad = (torch.randn(4, CHANNELS, 7, 5, dtype=torch.float64) + 2 for _ in range(2))
        found = forward_backward(run, module, x[share], grad[share])
    return found | second_derivatives(run, module, x[share], grad[share]) | dict(module.named_buffers())


def second_derivatives(
    run: Callable[[Tensor], Tensor], module: nn.Module, x: Tensor, grad: Tensor
) -> dict[str, Tensor]:
    """Gradients of the squared gradient of x."""
    x = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(run(x), x, grad, create_graph=True)
    inputs = {"x": x} | {name: p for name, p in module.named_parameters() if "bias" not in name and "beta" not in name}
    found = torch.autograd.grad(first.square().sum(), list(inputs.values()), allow_unused=True)
    return {f"gradient of {name}, second": g for name, g in zip(inputs, found, strict=True) if g is not None}


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=len(SHARES))
    torch.save({case: compute(case, SHARES[rank]) for case in CASES}, f"{folder}/{rank}.pt")
    norm = build("affine")
    for transform in (torch.func.grad, lambda f: lambda x: torch.func.jvp(f, (x,), (x,))):
        with pytest.raises(NotImplementedError, match="synchronized batch norm over several processes"):
            transform(lambda x: norm(x).sum())(torch.randn(1, CHANNELS, 7, 5, dtype=torch.float64))
    # Neither leaves while the other still talks to it.
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict[str, dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=len(SHARES))
    return [torch.load(Path(folder) / f"{rank}.pt") for rank in range(len(SHARES))]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_equal_one(both, case):
    whole = compute(case, slice(None))
    first, second = (process[case] for process in both)
    assert whole.keys() == first.keys() == second.keys()
    for name, expected in whole.items():
        if name in ("y", "gradient of x", "gradient of x, second"):
            got = torch.cat((first[name], second[name]))
        elif name.startswith("gradient of"):
            got = first[name] + second[name]
        else:
            assert torch.equal(first[name], second[name]), name
            got = first[name]
        assert relative_error(got, expected) < 1e-12, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_one_process_is_plain_batch_norm(training, dtype):
    synchronized = build("affine").to(dtype).train(training)
    plain = nn.BatchNorm2d(CHANNELS).to(dtype).train(training)
    plain.load_state_dict(copy.deepcopy(synchronized.state_dict()))
    x, grad = torch.randn(2, 4, CHANNELS, 7, 5).to(dtype)
    expected = forward_backward(plain, plain, x, grad) | plain.state_dict()
    for name, value in (forward_backward(synchronized, synchronized, x, grad) | synchronized.state_dict()).items():
        assert torch.equal(value, expected[name]), name
