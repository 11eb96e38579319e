"""The SPADE layer under torch.compile and torch.export."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spade_kernels import SPADE, LabelMap
from spade_kernels.testing import MASK_KINDS, forward_backward, random_label_map, random_spade

pytestmark = pytest.mark.usefixtures("backend")

NORMS = [("instance", True), ("batch", True), ("batch", False)]
CLASSES, CHANNELS = 5, 4


def check_compiled(layer: SPADE, x: Tensor, segmap: LabelMap | Tensor, fullgraph: bool) -> None:
    torch._dynamo.reset()
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=fullgraph)
    expected = forward_backward(lambda x: layer(x, segmap), layer, x, x)
    got = forward_backward(lambda x: compiled(x, segmap), twin, x, x)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, msg=name)
    for name, value in layer.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


@pytest.mark.parametrize(("norm", "training"), NORMS)
@pytest.mark.parametrize("form", ["dense", "label map with its index", "label map"])
def test_compile(form, norm, training):
    label_map = random_label_map("blobs", (2, 10, 10), CLASSES)
    layer = random_spade(f"spade{norm}3x3", CHANNELS, CLASSES).train(training)
    x = torch.randn(2, CHANNELS, 10, 10)
    if form == "label map with its index":
        copy.deepcopy(layer)(x, label_map)
    segmap = label_map.one_hot() + 0.5 if form == "dense" else label_map
    check_compiled(layer, x, segmap, fullgraph=form != "label map")


def test_one_compiled_graph_serves_every_label_map():
    """The second compilation is for the number of rows, which the first took for a constant."""
    torch._dynamo.reset()
    layer = random_spade("spadeinstance3x3", CHANNELS, CLASSES)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    x = torch.randn(2, CHANNELS, 10, 10)
    for kind in MASK_KINDS:
        label_map = random_label_map(kind, (2, 10, 10), CLASSES)
        expected = layer(x, label_map)
        torch.testing.assert_close(compiled(x, label_map), expected)
    assert counter.frame_count == 2


def test_export_with_a_dense_condition():
    layer = random_spade("spadebatch3x3", CHANNELS, CLASSES).eval()
    x, planes = torch.randn(2, CHANNELS, 10, 10), random_label_map("blobs", (2, 10, 10), CLASSES).one_hot()
    program = torch.export.export(layer, (x, planes))
    torch.testing.assert_close(program.module()(x, planes), layer(x, planes))
