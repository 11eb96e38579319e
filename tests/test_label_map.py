"""LabelMap: conversions, copies, what is kept, and convolution and pooling without a one-hot tensor."""

from __future__ import annotations

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from spade_kernels import SPADE, LabelMap, instance_edges, ops
from spade_kernels import label_map as label_map_module
from spade_kernels.cache import Cache
from spade_kernels.condition import conv2d
from spade_kernels.testing import (
    MASK_KINDS,
    assert_within_budget,
    forward_backward,
    random_label_map,
    random_labels,
    relative_error,
)

pytestmark = pytest.mark.usefixtures("backend")

CONDITIONS = [{}, {"edges": True}, {"ignore": True}, {"edges": True, "ignore": True}]
SHAPE, CLASSES = (2, 13, 10), 5


def one_hot_by_hand(label_map: LabelMap) -> Tensor:
    ignored = label_map.labels == (-1 if label_map.ignore_index is None else label_map.ignore_index)
    planes = F.one_hot(label_map.labels.long().masked_fill(ignored, 0), label_map.num_labels).permute(0, 3, 1, 2)
    planes = planes * ~ignored.unsqueeze(1)
    return planes if label_map.edges is None else torch.cat((planes, label_map.edges.unsqueeze(1)), 1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_one_hot(condition):
    label_map = random_label_map("noise", SHAPE, CLASSES, **condition)
    expected = one_hot_by_hand(label_map)
    assert label_map.channels == expected.shape[1]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        assert label_map.one_hot(dtype).dtype == dtype
        assert torch.equal(label_map.one_hot(dtype), expected.to(dtype))


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_from_one_hot_reads_back(condition, dtype):
    label_map = random_label_map("noise", SHAPE, CLASSES, **condition)
    read = LabelMap.from_one_hot(label_map.one_hot(dtype), edges=label_map.edges is not None)
    assert torch.equal(read.codes, label_map.codes)
    assert torch.equal(read.one_hot(), label_map.one_hot())


@pytest.mark.parametrize(
    ("pixel", "value"), [((0, 1, 2, 3), 0.5), ((1, 0, 0, 0), 2.0), ((1, 4, 6, 7), float("nan")), ((0, 5, 2, 3), 0.5)]
)
def test_from_one_hot_names_the_pixel(pixel, value):
    planes = random_label_map("noise", SHAPE, CLASSES, edges=True).one_hot()
    planes[pixel] = value
    n, _, y, x = pixel
    with pytest.raises(ValueError, match=rf"not one-hot at image {n}, pixel \(x={x}, y={y}\)"):
        LabelMap.from_one_hot(planes)


def test_from_one_hot_refuses_two_classes_at_a_pixel():
    planes = random_label_map("constant", SHAPE, CLASSES).one_hot()
    planes[1, :, 3, 4] = 1
    with pytest.raises(ValueError, match=r"image 1, pixel \(x=4, y=3\)"):
        LabelMap.from_one_hot(planes, edges=False)
    with pytest.raises(ValueError, match="expected one-hot planes"):
        LabelMap.from_one_hot(planes[0])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.int64])
def test_every_integer_dtype(dtype):
    labels = random_labels("noise", SHAPE, 100)
    assert torch.equal(LabelMap(labels.to(dtype), 100).codes, labels + 1)


def test_class_count_and_ignored_value_beyond_the_labels_dtype():
    labels = torch.tensor([[[0, 255]]], dtype=torch.uint8)
    assert LabelMap(labels, 300).codes.tolist() == [[[1, 256]]]
    assert LabelMap(labels, 300, ignore_index=255).codes.tolist() == [[[1, 301]]]
    with pytest.raises(ValueError, match="label 255"):
        LabelMap(labels, 5, ignore_index=-1)


@pytest.fixture(autouse=True)
def _on_cpu(backend):
    if backend in ("triton", "cuda"):
        pytest.skip("label maps are the same everywhere; tests/gpu moves them")


LABELS = torch.zeros(2, 3, 4, dtype=torch.int64)
BAD_LABEL = LABELS.clone()
BAD_LABEL[1, 2, 3] = 7


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((LABELS.float(), 5), TypeError, "integer tensor, got torch.float32; for one-hot planes use"),
        ((LABELS.bool(), 5), TypeError, "integer tensor, got torch.bool"),
        (([[0]], 5), TypeError, "integer tensor, got list"),
        ((LABELS[0], 5), ValueError, r"shape \(N, H, W\), got \(3, 4\)"),
        ((LABELS[:0], 5), ValueError, r"empty: shape \(0, 3, 4\)"),
        ((LABELS, 0), ValueError, "num_labels must be at least 1, got 0"),
        ((BAD_LABEL, 7), ValueError, r"label 7 at image 1, pixel \(x=3, y=2\) is outside 0..6 \(1 such pixels\)"),
        ((BAD_LABEL, 7, None, 9), ValueError, "label 7 at image 1"),
        ((-BAD_LABEL, 5), ValueError, "label -7 at image 1"),
        ((LABELS, 5, LABELS), TypeError, "edges must be a boolean tensor, got torch.int64"),
        ((LABELS, 5, LABELS[:1].bool()), ValueError, r"edges have shape \(1, 3, 4\), labels \(2, 3, 4\)"),
        ((LABELS, 5, LABELS.bool().to("meta")), ValueError, "edges are on meta, labels on cpu"),
    ],
)
def test_refusals_name_the_value(arguments, error, message):
    with pytest.raises(error, match=message):
        LabelMap(*arguments)


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("shape", [(2, 13, 10), (1, 1, 1), (1, 2, 7), (2, 16, 16)])
def test_pooling_twice(shape, condition):
    label_map = random_label_map("blobs", shape, CLASSES, **condition)
    planes = label_map.one_hot(torch.float64)
    for _ in range(2):
        label_map, planes = label_map.avg_pool(), F.avg_pool2d(planes, 3, 2, 1, count_include_pad=False)
        assert relative_error(label_map.one_hot(torch.float64), planes) < 1e-12


CONVOLUTIONS = [(3, 1, 1, None), (4, 2, 2, None), (1, 1, 0, (5, 5)), (3, 1, 1, (20, 3)), (3, 2, 1, (7, 7))]


@pytest.mark.parametrize(("kernel_size", "stride", "padding", "size"), CONVOLUTIONS)
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_convolution(dtype, pooled, has_bias, kernel_size, stride, padding, size):
    label_map = random_label_map("blobs", (2, 40, 48), CLASSES, edges=True)
    label_map = label_map.avg_pool() if pooled else label_map
    conv = nn.Conv2d(label_map.channels, 16, kernel_size, stride, padding, bias=has_bias).to(dtype)
    exact_conv = copy.deepcopy(conv).double()

    def run(conv: nn.Module, segmap: LabelMap | Tensor) -> dict[str, Tensor]:
        conv.zero_grad()
        y = conv2d(segmap, conv.weight, conv.bias, stride, padding, size)
        y.backward(torch.linspace(-1, 2, y.numel()).view(y.shape).to(y.dtype))
        return {"y": y.detach()} | {name: p.grad.clone() for name, p in conv.named_parameters()}

    exact = run(exact_conv, label_map.one_hot(torch.float64))
    assert_within_budget(run(conv, label_map), run(conv, label_map.one_hot(dtype)), exact)


def test_low_precision_convolution_over_a_large_region():
    """One row used by 64 thousand pixels: adding up its gradient in bfloat16 would stop at a few hundred."""
    label_map = random_label_map("constant", (1, 256, 256), CLASSES)
    weight = torch.zeros(4, CLASSES, 3, 3, dtype=torch.bfloat16, requires_grad=True)
    conv2d(label_map, weight, padding=1).sum().backward()
    expected = torch.zeros(4, CLASSES, 3, 3)
    label = label_map.labels[0, 0, 0]
    expected[:, label] = torch.tensor([255.0, 256, 255]).outer(torch.tensor([255.0, 256, 255]))
    torch.testing.assert_close(weight.grad.float(), expected, rtol=2**-7, atol=0)


def test_convolution_refusals():
    label_map = random_label_map("blobs", SHAPE, CLASSES)
    with pytest.raises(ValueError, match="5 condition channels, the weight takes 6"):
        conv2d(label_map, torch.zeros(2, 6, 3, 3))
    with pytest.raises(ValueError, match="must be square"):
        conv2d(label_map, torch.zeros(2, CLASSES, 3, 1))
    with pytest.raises(ValueError, match=r"no 15x15 window fits size \(13, 10\) with padding 1"):
        conv2d(label_map, torch.zeros(2, CLASSES, 15, 15), padding=1)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_cat_and_slices(condition):
    parts = [random_label_map(kind, SHAPE, CLASSES, **condition) for kind in ("blobs", "noise")]
    whole = LabelMap.cat(parts)
    assert len(whole) == 4
    assert torch.equal(whole.one_hot(), torch.cat([part.one_hot() for part in parts]))
    assert torch.equal(whole[1:3].one_hot(), whole.one_hot()[1:3])
    assert torch.equal(whole[1:3].labels, whole.labels[1:3])
    pooled = whole.avg_pool()
    assert torch.equal(LabelMap.cat([pooled[:1], pooled[1:]]).one_hot(), pooled.one_hot())


def test_cat_and_slice_refusals():
    label_map = random_label_map("noise", SHAPE, CLASSES)
    other = random_label_map("blobs", SHAPE, CLASSES)
    smaller = random_label_map("noise", (2, 6, 5), CLASSES)
    for parts in (
        [label_map, smaller],
        [label_map, random_label_map("noise", SHAPE, CLASSES + 1)],
        [label_map, random_label_map("noise", SHAPE, CLASSES, edges=True)],
        [label_map.avg_pool(), other.avg_pool()],
        [],
    ):
        with pytest.raises(ValueError, match="cannot form one batch"):
            LabelMap.cat(parts)
    with pytest.raises(TypeError, match="takes a slice of images"):
        label_map[0]
    with pytest.raises(ValueError, match="none of the 2 images"):
        label_map[2:]


def test_everything_is_built_once():
    label_map = random_label_map("blobs", SHAPE, CLASSES)
    index = label_map.window_index((6, 6), 3)
    assert label_map.window_index(torch.Size((6, 6)), 3) == index
    assert index.hidden is label_map.windows((6, 6), 3, 1, 1)
    assert index.modulation.row_segments is index.modulation.row_segments
    assert label_map.avg_pool() is label_map.avg_pool()
    assert label_map.window_index((6, 6), 5) != index
    assert label_map[:].window_index((6, 6), 3) != index
    assert label_map.to("cpu") is label_map


def test_indexes_at_several_sizes_are_built_at_once(monkeypatch):
    """On a GPU each call asks the device for its numbers of rows."""
    label_map = random_label_map("blobs", SHAPE, CLASSES)
    seen, sizes, window_index = label_map.windows((6, 6), 3, 1, 1), [], ops.window_index

    def counted(ids, wanted, *how, **more):
        sizes.append(wanted)
        return window_index(ids, wanted, *how, **more)

    monkeypatch.setattr(ops, "window_index", counted)
    label_map.prepare([(6, 6), (13, 10), (6, 6)])
    label_map.prepare([(13, 10), (9, 9)])
    assert sizes == [[(6, 6), (13, 10)], [(9, 9)]]
    assert label_map.window_index((6, 6), 3).hidden is seen
    for size in [(6, 6), (13, 10), (9, 9)]:
        alone = random_label_map("blobs", SHAPE, CLASSES).window_index(size, 3)
        for got, expected in zip(label_map.window_index(size, 3), alone, strict=True):
            assert got.num_ids == expected.num_ids
            assert torch.equal(got.windows, expected.windows)
            assert torch.equal(got.pixel_row, expected.pixel_row)


SIZES = [(6, 5), (13, 10)]


def prepared_label_map(seed: int = 0) -> LabelMap:
    """With everything built that a label map can keep."""
    label_map = random_label_map("blobs", SHAPE, CLASSES, edges=True, seed=seed).prepare(SIZES)
    assert label_map.avg_pool().prepare(SIZES).windows((6, 5), 4, 2, 2).tap_segments
    return label_map


def tensors(nest) -> dict[str, Tensor]:
    """Every tensor that an object holds, by where."""
    if isinstance(nest, Tensor):
        return {"": nest}
    parts = dict(enumerate(nest)) if isinstance(nest, tuple) else getattr(nest, "__dict__", nest)
    if not isinstance(parts, dict):
        return {}
    return {f"{key} {where}": t for key, part in parts.items() for where, t in tensors(part).items()}


def assert_same(got: LabelMap, expected: LabelMap) -> None:
    got_tensors, expected_tensors = tensors(got), tensors(expected)
    assert list(got_tensors) == list(expected_tensors)
    for where, t in expected_tensors.items():
        assert got_tensors[where].dtype == t.dtype, where
        assert torch.equal(got_tensors[where], t), where


def test_prepare_builds_all_that_a_layer_needs():
    layer, x = SPADE("spadebatch3x3", 4, CLASSES + 1), torch.randn(2, 4, 6, 5)
    label_map = random_label_map("blobs", SHAPE, CLASSES, edges=True)
    assert label_map.prepare([(6, 5)]) is label_map
    kept = set(tensors(label_map))
    forward_backward(lambda x: layer(x, label_map), layer, x, x)
    assert set(tensors(label_map)) == kept
    without = random_label_map("blobs", SHAPE, CLASSES, edges=True).prepare([(6, 5)], gradients=False)
    assert {where for where in kept if "tap_segments" in where or "row_segments" in where} == kept - set(
        tensors(without)
    )


def test_labels_without_values():
    with pytest.raises(ValueError, match="labels on the meta device have no values to check"):
        LabelMap(LABELS.to("meta"), 5)


def test_to_another_device():
    label_map = prepared_label_map()
    moved = label_map.to("meta")
    assert moved.device.type == moved.avg_pool().device.type == "meta"
    assert moved.shape == label_map.shape
    assert {where: (t.shape, t.dtype) for where, t in tensors(moved).items()} == {
        where: (t.shape, t.dtype) for where, t in tensors(label_map).items()
    }
    assert {t.device.type for t in tensors(moved).values()} == {"meta"}
    assert label_map.device.type == "cpu"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs CUDA")
def test_pin_memory():
    label_map = prepared_label_map()
    pinned = label_map.pin_memory()
    assert all(t.is_pinned() for t in tensors(pinned).values())
    for copied in (pinned, pinned.to("cuda", non_blocking=True).to("cpu")):
        assert_same(copied, label_map)


def test_what_is_returned_is_not_what_is_kept():
    labels = random_labels("blobs", SHAPE, CLASSES)
    label_map = LabelMap(labels.clone(), CLASSES)
    for pooled in (False, True):
        source = label_map.avg_pool() if pooled else label_map
        before = source.one_hot().clone()
        source.one_hot().zero_()
        conv2d(source, torch.ones(1, CLASSES, 1, 1)).zero_()
        source.codebook().zero_()
        assert torch.equal(source.one_hot(), before)
    label_map.labels.zero_()
    assert torch.equal(label_map.one_hot(), LabelMap(labels, CLASSES).one_hot())


def test_index_built_in_inference_mode_serves_training():
    layer, x = SPADE("spadeinstance3x3", 4, CLASSES), torch.randn(2, 4, 13, 10)
    conv = nn.Conv2d(CLASSES, 3, 3).double()
    with torch.inference_mode():
        label_map = random_label_map("blobs", SHAPE, CLASSES)
        layer(x, label_map)
        conv2d(label_map.avg_pool(), conv.weight)
    forward_backward(lambda x: layer(x, label_map), layer, x, x)
    conv2d(label_map.avg_pool(), conv.weight).sum().backward()
    assert conv.weight.grad.abs().sum() > 0


class _Maps(Dataset):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, number: int) -> LabelMap:
        return prepared_label_map(number)


def test_loader_workers_send_label_maps_with_their_indexes():
    loader = DataLoader(_Maps(), batch_size=None, num_workers=1)
    for number, received in enumerate(loader):
        assert_same(received, prepared_label_map(number))


def test_a_loader_makes_one_label_map_of_several():
    (whole,) = DataLoader(_Maps(), batch_size=2)
    assert torch.equal(whole.codes, LabelMap.cat([prepared_label_map(0), prepared_label_map(1)]).codes)


class _TensorCounter(pickle.Pickler):
    count = 0

    def reducer_override(self, value):
        self.count += isinstance(value, Tensor)
        return NotImplemented


def test_pickles_as_one_tensor():
    counter = _TensorCounter(io.BytesIO())
    counter.dump(prepared_label_map())
    assert counter.count == 1


@pytest.mark.parametrize("inference", [False, True])
def test_copies(inference):
    label_map, file = prepared_label_map(), io.BytesIO()
    with torch.inference_mode(inference):
        torch.save(label_map, file)
        file.seek(0)
        copies = [torch.load(file), pickle.loads(pickle.dumps(label_map)), copy.deepcopy(label_map)]
    for twin in copies:
        assert_same(twin, label_map)
        assert not any(t.is_inference() for t in tensors(twin).values())
        assert repr(twin) == repr(label_map) == "LabelMap((2, 13, 10), num_labels=5, edges, device=cpu)"


@settings(derandomize=True, deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(MASK_KINDS),
    shape=st.tuples(st.integers(1, 2), st.integers(1, 9), st.integers(1, 9)),
    dtype=st.sampled_from([torch.uint8, torch.int32, torch.uint16]),
)
def test_instance_edges(kind, shape, dtype):
    instances = random_labels(kind, shape, 4)
    _, height, width = shape
    expected = torch.zeros(shape, dtype=torch.bool)
    for n, y, x in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        for other_y, other_x in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
            if 0 <= other_y < height and 0 <= other_x < width:
                expected[n, y, x] |= instances[n, y, x] != instances[n, other_y, other_x]
    assert torch.equal(instance_edges(instances.to(dtype)), expected)
    assert torch.equal(instance_edges(instances[0].to(dtype)), expected[0])


@pytest.mark.parametrize("edges", [False, True])
@pytest.mark.parametrize("pooled", [False, True])
def test_weigh_is_the_product_with_the_codebook(edges, pooled):
    label_map = random_label_map("blobs", (2, 12, 16), 5, edges=edges, ignore=True)
    label_map = label_map.avg_pool() if pooled else label_map
    rows = torch.randn(label_map.channels, 7, dtype=torch.float64)
    expected = label_map.codebook(torch.float64) @ rows
    assert torch.equal(label_map.codebook_matmul(rows), expected)


@pytest.mark.parametrize("edges", [False, True])
def test_the_cached_codebook(edges, monkeypatch):
    """A GPU multiplies by one codebook tensor for all label maps of a kind, and by another for other kinds."""
    monkeypatch.setattr(label_map_module, "_codebooks", Cache(shared=True))
    of_kind = [random_label_map("blobs", (1, 4, 4), 5, edges=edges, seed=seed) for seed in (0, 1)]
    other = random_label_map("blobs", (1, 4, 4), 5, edges=not edges)
    first, second = (label_map_module._cached_codebook(label_map, torch.float32) for label_map in of_kind)
    assert first is second
    assert torch.equal(first, of_kind[0].codebook())
    assert torch.equal(label_map_module._cached_codebook(other, torch.float32), other.codebook())
    assert label_map_module._cached_codebook(other, torch.float64).dtype == torch.float64


@pytest.mark.parametrize(
    ("products", "convolutions", "coarser"),
    [("tf32", "ieee", True), ("tf32", "tf32", False), ("none", "tf32", False), ("none", "none", False)],
)
def test_settings_of_float32(products, convolutions, coarser, monkeypatch):
    """A GPU's products round as products are set to, while taps belong to a convolution."""
    monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(fp32_precision=products))
    monkeypatch.setattr(torch.backends.cudnn, "conv", SimpleNamespace(fp32_precision=convolutions))
    assert label_map_module._products_are_coarser(torch.float32) == coarser
    assert not label_map_module._products_are_coarser(torch.bfloat16)
