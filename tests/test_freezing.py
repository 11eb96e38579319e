"""`freeze`: what a frozen network makes equals what it made before, and every way out of being frozen."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import spade_kernels as sk
from spade_kernels import LabelMap, functional
from spade_kernels.convolution import Conv2d
from spade_kernels.freezing import Freezable
from spade_kernels.testing import random_label_map, random_spade, relative_error
from spade_model.networks import SPADEGenerator

pytestmark = pytest.mark.usefixtures("backend")

CLASSES = 5
LIMITS = {torch.float32: 1e-5, torch.float64: 1e-12}


def mask(edges: bool = True, size: int = 32, kind: str = "blobs") -> LabelMap:
    return random_label_map(kind, (2, size, size), CLASSES, edges=edges)


def generator(edges: bool = True, dtype: torch.dtype = torch.float32, **options) -> SPADEGenerator:
    """In eval mode after a few training passes: of fresh spectral vectors the network's output is mostly noise."""
    torch.manual_seed(0)
    network = SPADEGenerator(CLASSES + edges, **{"ngf": 2, "crop_size": 32, **options}).to(dtype)
    z = torch.randn(2, network.z_dim, dtype=dtype)
    with torch.no_grad():
        for _ in range(5):
            network(mask(edges), z)
    return network.eval()


def change_weights(network: nn.Module) -> None:
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.5)


def is_frozen(network: nn.Module) -> bool:
    with torch.no_grad():
        frozen = {part.packed() is not None for part in network.modules() if isinstance(part, Freezable)}
    assert len(frozen) == 1, "some parts are frozen, others are not"
    return frozen.pop()


def fresh(network: SPADEGenerator) -> SPADEGenerator:
    """Another network with the same weights, never frozen."""
    torch.manual_seed(1)
    twin = copy.deepcopy(network).eval()
    assert not is_frozen(twin)
    return twin


@torch.no_grad()
def assert_same_images(network: nn.Module, expected: nn.Module, dtype: torch.dtype = torch.float32, **how) -> None:
    assert relative_error(network(mask(**how)), expected(mask(**how))) < LIMITS[dtype]


def segmaps(edges: bool, dtype: torch.dtype) -> dict[str, LabelMap | Tensor]:
    label_map = mask(edges)
    planes = label_map.one_hot(dtype)
    forms = {"label map": label_map, "one-hot": planes, "dense": planes + torch.rand_like(planes)}
    return forms if edges else {"integers": label_map.labels, **forms}


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("edges", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"norm_G": "spadebatch3x3"},
        {"norm_G": "spectralspadeinstance1x1", "crop_size": 64},
        {"use_vae": True, "z_dim": 4},
    ],
    ids=["default", "no spectral norm", "instance 1x1", "vae"],
)
@torch.no_grad()
def test_images_are_the_same(options, edges, dtype):
    network = generator(edges, dtype, **options)
    z = torch.randn(2, network.z_dim, dtype=dtype)
    forms = segmaps(edges, dtype)
    expected = {name: network(segmap, z) for name, segmap in forms.items()}
    network.freeze()
    for name, segmap in forms.items():
        got = network(segmap, z)
        assert got.dtype == dtype
        assert relative_error(got, expected[name]) < LIMITS[dtype], name


@torch.no_grad()
def test_a_frozen_layer_takes_any_label_map():
    """With edges and without, of ignored pixels, and pooled: each has its own codes."""
    layer = random_spade("spadebatch3x3", 4, CLASSES).double()
    sk.freeze(layer)
    x = torch.randn(2, 4, 9, 10, dtype=torch.float64)
    narrow = random_label_map("blobs", (2, 16, 16), CLASSES - 1, edges=True)
    for segmap in (mask(False), narrow, narrow.avg_pool(), random_label_map("noise", (2, 9, 9), CLASSES, ignore=True)):
        for _ in range(2):
            assert relative_error(layer(x, segmap), copy.deepcopy(layer)(x, segmap)) < 1e-12


@torch.no_grad()
def test_one_frozen_network_takes_any_size_and_batch():
    """oneDNN's own weight layout is chosen for the first input it meets."""
    network, twin = (random_blocks() for _ in range(2))
    sk.freeze(network)
    for shape in [(1, 8, 8, 8), (2, 8, 33, 20), (4, 8, 1, 1), (1, 8, 8, 8)]:
        x = torch.randn(shape)
        for memory_format in (torch.contiguous_format, torch.channels_last):
            got = network(x.contiguous(memory_format=memory_format))
            assert relative_error(got, twin(x)) < LIMITS[torch.float32]


def random_blocks() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.Sequential(Conv2d(8, 12, 3, padding=1), Conv2d(12, 6, 1, bias=False, spectral=True))
    blocks(torch.randn(1, 8, 4, 4))
    return blocks.eval()


def test_freezing_is_eval_mode_and_leaves_the_state_dict_alone():
    network = generator().train()
    before = copy.deepcopy(network.state_dict())
    network.freeze()
    assert is_frozen(network)
    assert not any(part.training for part in network.modules())
    with torch.no_grad():
        network(mask())
    after = network.state_dict()
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name


def test_eval_keeps_it_frozen_and_train_lets_go():
    network = generator()
    network.freeze()
    assert is_frozen(network.eval())
    change_weights(network.train())
    assert_same_images(network.eval(), fresh(network))
    network.freeze()
    assert_same_images(network, fresh(network))


@torch.no_grad()
def test_statistics_are_not_kept():
    """Weights stand still, but statistics may be taken anew."""
    layer, x, segmap = random_spade("spadebatch3x3", 4, CLASSES), torch.randn(2, 4, 9, 10), mask(False)
    sk.freeze(layer)
    first = layer(x, segmap)
    layer.param_free_norm.train()
    layer(x * 3 + 1, segmap)
    layer.param_free_norm.eval()
    assert is_frozen(layer)
    assert relative_error(layer(x, segmap), copy.deepcopy(layer)(x, segmap)) < LIMITS[torch.float32]
    assert relative_error(layer(x, segmap), first) > 0.1


def average_in_place(network: SPADEGenerator) -> None:
    for parameter in network.parameters():
        parameter.lerp_(parameter.flip(0), 0.1)


def replace_a_weight(network: SPADEGenerator) -> None:
    network.up_0.norm_0.mlp_gamma.weight = nn.Parameter(network.up_0.norm_0.mlp_gamma.weight.flip(0))


def load_into_a_part(network: SPADEGenerator) -> None:
    part = network.up_0.norm_0.mlp_beta
    part.load_state_dict({name: 2 * value for name, value in part.state_dict().items()})


@pytest.mark.parametrize("change", [average_in_place, replace_a_weight, load_into_a_part])
@torch.no_grad()
def test_changes_that_torch_counts_are_noticed(change):
    network = generator()
    network.freeze()
    before = network(mask())
    change(network)
    assert is_frozen(network)
    assert_same_images(network, fresh(network))
    assert relative_error(network(mask()), before) > 1e-3


@torch.no_grad()
def test_other_weights_for_one_call():
    network, other = generator(), generator()
    average_in_place(other)
    network.freeze()
    before, expected = network(mask()), other(mask())
    got = torch.func.functional_call(network, dict(other.state_dict()), (mask(),))
    assert relative_error(got, expected) < LIMITS[torch.float32]
    assert relative_error(network(mask()), before) < LIMITS[torch.float32]


def load(network: SPADEGenerator) -> SPADEGenerator:
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()})
    return network


def load_by_assignment(network: SPADEGenerator) -> SPADEGenerator:
    network.load_state_dict({name: value * 1.5 for name, value in network.state_dict().items()}, assign=True)
    return network


def through_pickle(network: SPADEGenerator) -> SPADEGenerator:
    return pickle.loads(pickle.dumps(network))


@pytest.mark.parametrize("change", [load, load_by_assignment, copy.deepcopy, through_pickle, nn.Module.double])
def test_what_lets_go(change: Callable[[SPADEGenerator], SPADEGenerator]):
    network = generator()
    network.freeze()
    with torch.no_grad():
        network(mask())  # A packed weight is a different thing to copy.
    changed = change(network)
    assert not is_frozen(changed)
    dtype = next(changed.parameters()).dtype
    assert_same_images(changed, fresh(changed), dtype)
    changed.freeze()
    assert_same_images(changed, fresh(changed), dtype)


def test_a_copy_is_independent():
    network = generator()
    network.freeze()
    twin = copy.deepcopy(network)
    with torch.no_grad():
        expected = network(mask())
        change_weights(twin)
        torch.testing.assert_close(network(mask()), expected, rtol=0, atol=0)


@pytest.mark.parametrize("condition", ["label map", "dense"])
def test_gradients_of_a_frozen_network(condition):
    network = generator(dtype=torch.float64)
    twin = fresh(network)
    network.freeze()
    segmap = segmaps(True, torch.float64)[condition]
    for net in (network, twin):
        net(segmap).square().sum().backward()
    expected = dict(twin.named_parameters())
    for name, parameter in network.named_parameters():
        assert relative_error(parameter.grad, expected[name].grad) < 1e-12, name
    assert is_frozen(network)


def test_inference_mode_and_no_grad_take_turns():
    network = generator()
    with torch.no_grad():
        expected = network(mask())
    with torch.inference_mode():
        network.freeze()
        inferred = network(mask())
    with torch.no_grad():
        images = network(mask())
    images_with_gradients = network(mask())
    images_with_gradients.sum().backward()
    for got in (inferred, images, images_with_gradients):
        assert relative_error(got, expected) < LIMITS[torch.float32]


@torch.no_grad()
def test_compiled():
    torch._dynamo.reset()
    block, x = generator(dtype=torch.float64).up_3, torch.randn(2, 4, 8, 8, dtype=torch.float64)
    expected = block(x, mask())
    sk.freeze(block)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        assert relative_error(compiled(x, mask()), expected) < 1e-12
    assert is_frozen(block)
    change_weights(block.train())
    block.eval()
    assert relative_error(compiled(x, mask()), copy.deepcopy(block)(x, mask())) < 1e-12


@pytest.mark.parametrize("kind", ["label map", "dense"])
@torch.no_grad()
def test_compiled_code_of_packed_weights(kind):
    """Compiled code does not touch what packs itself for the first input."""
    torch._dynamo.reset()
    network = generator()
    network.freeze()
    condition = mask() if kind == "label map" else mask().one_hot(torch.float32)
    expected = network(condition)
    compiled = torch.compile(network, backend="aot_eager", fullgraph=True)
    assert relative_error(compiled(condition), expected) < LIMITS[torch.float32]


@pytest.mark.parametrize("kind", ["label map", "dense"])
@torch.no_grad()
def test_compiled_code_reads_what_is_kept(kind):
    """Weights in another dtype than CPUs pack, as all are on a GPU: their norm is not taken in every call."""
    torch._dynamo.reset()
    called: set[str] = set()

    def recorded(module, _):
        called.update(getattr(node.target, "__name__", str(node.target)) for node in module.graph.nodes)
        return module.forward

    block, x = generator(dtype=torch.float64).up_3, torch.randn(2, 4, 8, 8, dtype=torch.float64)
    condition = mask() if kind == "label map" else torch.randn(2, mask().channels, 8, 8, dtype=torch.float64)
    expected = block(x, condition)
    compiled = torch.compile(block, backend=recorded, fullgraph=True)
    assert relative_error(compiled(x, condition), expected) < 1e-12
    assert "dot" in called
    called.clear()
    sk.freeze(block)
    for _ in range(2):
        assert relative_error(compiled(x, condition), expected) < 1e-12
    assert called
    assert "dot" not in called
    # The first call that is not compiled caches values that depend on the condition.
    block(x, condition)
    called.clear()
    torch._dynamo.reset()
    assert relative_error(compiled(x, condition), expected) < 1e-12
    assert called
    assert called.isdisjoint({"pad", "cat"})
    change_weights(block)
    sk.freeze(block)
    assert relative_error(compiled(x, condition), copy.deepcopy(block)(x, condition)) < 1e-12


def test_nothing_to_freeze():
    with pytest.raises(ValueError, match="Linear holds no SPADE layer and no Conv2d of spade_kernels"):
        sk.freeze(nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"freeze takes an nn\.Module, got dict"):
        sk.freeze({})


@torch.no_grad()
def test_a_copy_of_a_frozen_module_with_parametrized_weights():
    """PyTorch copies those in its own way."""
    conv = Conv2d(8, 12, 3, padding=1)
    nn.utils.parametrizations.weight_norm(conv)
    sk.freeze(conv)
    x = torch.randn(1, 8, 16, 16)
    expected = conv(x)
    twin = copy.deepcopy(conv)
    assert twin.packed() is None
    assert relative_error(twin(x), expected) < LIMITS[torch.float32]


def test_the_table_of_a_repeated_label_map_is_built_twice(monkeypatch):
    """Samplers of diffusion models call with the same mask in every step."""
    layer = random_spade("spadebatch3x3", 4, CLASSES).eval()
    sk.freeze(layer)
    built, modulation_table = [], functional.ops.modulation_table
    monkeypatch.setattr(functional.ops, "modulation_table", lambda *args: built.append(1) or modulation_table(*args))
    mask, other = (random_label_map("blobs", (1, 8, 8), CLASSES, seed=seed) for seed in (0, 1))
    x = torch.randn(1, 4, 8, 8)
    with torch.no_grad():
        results = [layer(x, mask) for _ in range(4)]
        assert len(built) == 2
        assert all(torch.equal(y, results[0]) for y in results)
        assert not torch.equal(layer(x, other), results[0])
        assert torch.equal(layer(x, mask), results[0])
        assert len(built) == 4
        place = sk.StaticLabelMap(mask)
        for _ in range(3):
            layer(x, place.label_map)
        place.copy_(other)
        assert torch.equal(layer(x, place.label_map), layer(x, other)), "the place holds another label map now"
