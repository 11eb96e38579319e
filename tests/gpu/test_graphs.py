"""CUDA graphs: one capture serves many masks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_masks import indexed_mask
from torch import Tensor

import spade_kernels as sk
from spade_kernels.functional import use_path
from spade_kernels.testing import relative_error

KINDS = ("blobs", "islands", "constant")
LIMIT = {torch.float32: 1e-3, torch.bfloat16: 2e-2}


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
    """A graph of run(), after it has warmed up on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.fixture(autouse=True, params=["windows", "dense"])
def _path(request):
    with use_path(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_eval(generator, dtype):
    generator.to(dtype).eval()
    sk.freeze(generator)
    place = sk.StaticLabelMap(indexed_mask("noise", generator))
    images: list[Tensor] = []
    graph = capture(lambda: images.append(generator(place.label_map)))
    for kind in KINDS:
        place.copy_(indexed_mask(kind, generator))
        graph.replay()
        assert relative_error(images[-1], generator(indexed_mask(kind, generator))) < LIMIT[dtype], kind


def test_training(generator):
    """The gradients of every parameter, and the running statistics, for masks other than the captured one."""
    generator.train()
    first = indexed_mask("noise", generator)
    generator(first).sum().backward()
    place = sk.StaticLabelMap(first)
    parameters = dict(generator.named_parameters())
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)

    def step(mask: sk.LabelMap) -> None:
        for parameter in parameters.values():
            parameter.grad.zero_()
        generator(mask).square().mean().backward()

    def result() -> dict[str, Tensor]:
        found = {f"gradient of {name}": p.grad for name, p in parameters.items()} | generator.state_dict()
        return {name: value.clone() for name, value in found.items()}

    graph = capture(lambda: step(place.label_map))
    for kind in KINDS:
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        place.copy_(indexed_mask(kind, generator))
        graph.replay()
        replayed = result()
        generator.load_state_dict(before)
        step(indexed_mask(kind, generator))
        expected = result()
        # Some biases' gradients are zero but for rounding: they have no relative error of their own.
        largest = max(p.grad.abs().max() for p in parameters.values())
        for name, value in expected.items():
            if name.startswith("gradient"):
                assert (replayed[name] - value).abs().max() < 1e-2 * largest, (kind, name)
            else:
                assert relative_error(replayed[name], value) < 1e-2, (kind, name)


@torch.no_grad()
def test_from_the_loader_to_the_graph(generator):
    """A label map indexed on the CPU, pinned, and filled in without waiting for it."""
    generator.eval()
    with torch.device("cpu"):
        first, second = (indexed_mask(kind, generator) for kind in ("noise", "blobs"))
    place = sk.StaticLabelMap(first.to("cuda"))
    images: list[Tensor] = []
    graph = capture(lambda: images.append(generator(place.label_map)))
    place.copy_(second.pin_memory())
    graph.replay()
    assert relative_error(images[-1], generator(second.to("cuda"))) < LIMIT[torch.float32]
