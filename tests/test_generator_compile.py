"""torch.compile(fullgraph=True) and torch.export of the layer and the generator, and label maps prepared for them."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import shutil

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from spade_kernels import LabelMap
from spade_kernels.testing import MASK_KINDS, forward_backward, random_label_map, random_spade
from spade_model.networks import MultiscaleDiscriminator, SPADEGenerator
from spade_model.training import index_builder

CLASSES = 5


@pytest.fixture(autouse=True)
def _no_compiled_code():
    torch._dynamo.reset()


def generator(**options) -> SPADEGenerator:
    """In float64: in float32 the gradients of compiled stock operators differ by more than a test can allow."""
    return SPADEGenerator(CLASSES + 1, **{"ngf": 2, "crop_size": 64, **options}).double()


def mask(kind: str = "blobs", size: tuple[int, int] = (64, 64)) -> LabelMap:
    return random_label_map(kind, (2, *size), CLASSES, edges=True)


def layer_input() -> Tensor:
    return torch.randn(2, 4, 9, 10)


def assert_same_index(got: LabelMap, expected: LabelMap, size: tuple[int, int]) -> None:
    for mine, theirs in zip(got.window_index(size, 3), expected.window_index(size, 3), strict=True):
        assert torch.equal(mine.windows, theirs.windows)
        assert torch.equal(mine.pixel_row, theirs.pixel_row)
        assert mine.num_ids == theirs.num_ids


@pytest.mark.parametrize("num_upsampling_layers", ["normal", "more", "most"])
@pytest.mark.parametrize("norm_G", ["spectralspadesyncbatch3x3", "spadeinstance5x5"])
@pytest.mark.parametrize("aspect_ratio", [1.0, 2.0])
def test_a_prepared_label_map_lacks_nothing(num_upsampling_layers, norm_G, aspect_ratio, monkeypatch):
    options = {"norm_G": norm_G, "num_upsampling_layers": num_upsampling_layers, "aspect_ratio": aspect_ratio}
    network = SPADEGenerator(CLASSES + 1, ngf=2, crop_size=256, use_vae=True, z_dim=4, **options)
    discriminator = MultiscaleDiscriminator(CLASSES + 1, ndf=2)
    label_map = mask()
    index_builder(network, discriminator.num_D)(label_map)
    label_map = pickle.loads(pickle.dumps(label_map))  # as it comes from a worker
    monkeypatch.setattr("spade_kernels.ops.window_index", None)
    monkeypatch.setattr("spade_kernels.ops.segments_by_value", None)
    height, width = network(label_map).shape[2:]
    assert network.resolutions()[-1] == (height, width) == (256 / aspect_ratio, 256)
    discriminator(label_map, torch.randn(4, 3, 64, 64))


def test_other_generators_use_no_indexes(monkeypatch):
    label_map = mask()
    index_builder(torch.nn.Conv2d(1, 1, 1), 0)(label_map)
    assert not len(label_map.cache)


@pytest.mark.parametrize("training", [False, True])
def test_compiled_layer_builds_the_index(training):
    layer, x = random_spade("spadebatch3x3", 4, CLASSES + 1).train(training), layer_input()
    twin = copy.deepcopy(layer)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, backend=counter, fullgraph=True)
    for kind in MASK_KINDS:
        label_map, fresh = mask(kind), mask(kind)
        expected = forward_backward(lambda x, segmap=fresh: layer(x, segmap), layer, x, x)
        for _ in range(2):
            got = forward_backward(lambda x, segmap=label_map: compiled(x, segmap), twin, x, x)
            for name, value in expected.items():
                torch.testing.assert_close(got[name], value, msg=name)
        assert_same_index(label_map, mask(kind), (9, 10))
    # One that builds the index and one that finds it; perhaps one for the first label map's number of rows.
    assert counter.frame_count <= 3


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
def test_inductor():
    layer, x, label_map = random_spade("spadebatch3x3", 4, CLASSES + 1).eval(), layer_input(), mask()
    compiled = torch.compile(layer, fullgraph=True)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, label_map), layer(x, mask()))


def test_compiled_layer_builds_the_index_in_inference_mode():
    layer, x = random_spade("spadeinstance3x3", 4, CLASSES + 1), layer_input()
    with torch.inference_mode():
        got = torch.compile(layer, backend="aot_eager", fullgraph=True)(x, mask())
    torch.testing.assert_close(got, layer(x, mask()))


@pytest.mark.parametrize("prepared", [False, True])
def test_compiled_generator(prepared):
    network, label_map = generator().eval(), mask()
    if prepared:
        index_builder(network, 0)(label_map)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(label_map), network(mask()))
    assert_same_index(label_map, mask(), (32, 32))


def test_compiled_generator_in_training():
    network = generator()
    twin = copy.deepcopy(network)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    label_map = mask()
    index_builder(network, 0)(label_map)
    for run, net in ((network, network), (compiled, twin)):
        net.zero_grad()
        run(label_map).square().sum().backward()
    expected = dict(network.named_parameters())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name].grad, msg=name)
    for name, value in network.state_dict().items():
        torch.testing.assert_close(twin.state_dict()[name], value, msg=name)


def test_compiled_discriminator():
    network, image = MultiscaleDiscriminator(CLASSES + 1, ndf=2).double().eval(), torch.randn(2, 3, 64, 64).double()
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    label_map = mask()
    expected = network(mask(), image)
    for _ in range(2):
        torch.testing.assert_close(compiled(label_map, image), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer(strict):
    layer, x = random_spade("spadebatch3x3", 4, CLASSES + 1).eval(), layer_input()
    with torch.no_grad():
        dense = torch.export.export(layer, (x, mask().one_hot()), strict=strict).module()
        program = torch.export.export(layer, (x, mask()), strict=strict).module()
    for kind in MASK_KINDS:
        expected = layer(x, mask(kind))
        torch.testing.assert_close(program(x, mask(kind)), expected)
        torch.testing.assert_close(dense(x, mask(kind).one_hot()), expected)


@pytest.mark.parametrize("strict", [False, True])
def test_exported_layer_finds_out_which_sizes_are_free(strict):
    layer, x = random_spade("spadebatch3x3", 4, CLASSES + 1).eval(), layer_input()
    shapes = {"x": {2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}, "segmap": [None] * 4}
    program = torch.export.export(layer, (x, mask()), dynamic_shapes=shapes, strict=strict).module()
    torch.testing.assert_close(program(x, mask("stripes")), layer(x, mask("stripes")))


@pytest.mark.parametrize("edges", [False, True])
def test_exported_layer_takes_pooled_label_maps_of_its_size_only(edges):
    label_map = random_label_map("blobs", (2, 64, 64), CLASSES, edges=edges).avg_pool()
    layer, x = random_spade("spadebatch3x3", 4, label_map.channels).eval(), layer_input()
    program = torch.export.export(layer, (x, label_map)).module()
    torch.testing.assert_close(program(x, label_map), layer(x, label_map))
    with pytest.raises((AssertionError, RuntimeError, ValueError)):
        program(x, random_label_map("noise", (2, 10, 10), CLASSES, edges=edges))


def test_exported_generator(caplog):
    network = generator().eval()
    with torch.no_grad():
        program = torch.export.export(network, (mask(),))
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        loaded = torch.export.load(file).module()
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
        used = mask("stripes")
        torch.testing.assert_close(loaded(used), network(used))
        torch.testing.assert_close(loaded(used), network(used))
        dense = torch.export.export(network, (used.one_hot(torch.float64),)).module()
        torch.testing.assert_close(dense(used.one_hot(torch.float64)), network(used))
