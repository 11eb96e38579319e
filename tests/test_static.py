"""A label map at a fixed place gives the same results, with rows to spare, for one mask after the other."""

from __future__ import annotations

import pytest
import torch

import spade_kernels as sk
from spade_kernels.testing import forward_backward, random_label_map, random_labels, random_spade, relative_error
from spade_model.networks import SPADEGenerator

SIZE, CLASSES = (20, 24), 5


def masks(*kinds: str, count: int = 2) -> list[sk.LabelMap]:
    return [random_label_map(kind, (count, *SIZE), CLASSES, edges=True, seed=i) for i, kind in enumerate(kinds)]


@pytest.mark.parametrize("config", ["spadeinstance3x3", "spadebatch3x3", "spadebatch5x5"])
@pytest.mark.usefixtures("backend")
def test_same_result_with_rows_to_spare(config):
    layer = random_spade(config, 6, CLASSES + 1).double().train()
    kernel_size = int(config[-1])
    x, grad = torch.randn(2, 2, 6, *SIZE, dtype=torch.float64)
    busy, *others = masks("noise", "blobs", "islands", "constant", "noise")
    place = sk.StaticLabelMap(busy.prepare([SIZE], kernel_size))
    address = place.label_map.window_index(SIZE, kernel_size).modulation.windows.data_ptr()
    for mask in (busy, *others):
        state = {name: value.clone() for name, value in layer.state_dict().items()}
        expected = forward_backward(lambda x, mask=mask: layer(x, mask), layer, x, grad)
        layer.load_state_dict(state)
        got = forward_backward(lambda x, mask=mask: layer(x, place.copy_(mask)), layer, x, grad)
        for name, value in expected.items():
            assert relative_error(got[name], value) < 1e-12, name
        assert place.label_map.window_index(SIZE, kernel_size).modulation.windows.data_ptr() == address


def test_generator_reads_what_was_copied():
    torch.manual_seed(0)
    generator = SPADEGenerator(CLASSES + 1, ngf=2, crop_size=64).eval()
    first, second = (random_label_map(kind, (1, 64, 64), CLASSES, edges=True) for kind in ("noise", "blobs"))
    place = sk.StaticLabelMap(first.prepare(generator.resolutions(), gradients=False))
    with torch.inference_mode():
        generator(place.label_map)
        assert torch.equal(generator(place.copy_(second)), generator(second))


def test_nothing_stays_of_label_maps_before():
    """Where rows to spare still stood, the same label map would have other sums, but for rounding."""
    busy, target, *others = masks("noise", "islands", "blobs", "constant", "noise")
    place = sk.StaticLabelMap(busy.prepare([SIZE]))
    seen = []
    for before in others:
        place.copy_(before)
        index = place.copy_(target).window_index(SIZE, 3)
        seen.append([windows.windows.clone() for windows in index])
        seen[-1] += [t.clone() for windows in index for name in windows.cache for t in windows.cache[name]]
    for tensors in zip(*seen, strict=True):
        assert all(torch.equal(t, tensors[0]) for t in tensors)


def test_rows_are_rounded_up_by_a_quarter_at_most():
    for kind in ("noise", "blobs", "constant"):
        (mask,) = masks(kind, count=4)
        before = mask.window_index(SIZE, 3)
        after = sk.StaticLabelMap(mask).label_map.window_index(SIZE, 3)
        for old, new in zip(before, after, strict=True):
            assert len(old) <= len(new) <= max(len(old) * 1.25, len(old) + 64)
            assert len(new) <= old.pixel_row.numel()


def test_labels_of_any_integer_type():
    labels = random_labels("blobs", (1, *SIZE), CLASSES)
    place = sk.StaticLabelMap(sk.LabelMap(labels, CLASSES).prepare([SIZE]))
    other = sk.LabelMap(labels.flip(1).to(torch.uint8), CLASSES)
    assert torch.equal(place.copy_(other).one_hot(), other.one_hot())


@pytest.mark.parametrize(
    ("kind", "count", "labels", "edges", "message"),
    [
        ("blobs", 1, CLASSES, True, r"has shape \(1, 20, 24\), the place \(2, 20, 24\)"),
        ("blobs", 2, 4, True, "has num_labels 4, the place 5"),
        ("blobs", 2, CLASSES, False, "one has edges and one has not"),
        ("noise", 2, CLASSES, True, r"has \d+ distinct 3x3 windows at 20 x 24, the place has room for \d+"),
    ],
)
def test_what_does_not_fit(kind, count, labels, edges, message):
    (mask,) = masks("constant")
    place = sk.StaticLabelMap(mask.prepare([SIZE]))
    before = place.label_map.codes.clone()
    with pytest.raises(ValueError, match=message):
        place.copy_(random_label_map(kind, (count, *SIZE), labels, edges=edges))
    assert torch.equal(place.label_map.codes, before)


def test_training_of_a_generator():
    """Its first convolution's backward needs what `prepare` does not build."""
    generator = SPADEGenerator(CLASSES + 1, ngf=2, crop_size=64).double().train()
    first, second = (random_label_map(kind, (1, 64, 64), CLASSES, edges=True) for kind in ("noise", "blobs"))

    def gradients(mask: sk.LabelMap) -> dict[str, torch.Tensor]:
        generator.zero_grad()
        generator.load_state_dict(state)
        generator(mask).square().sum().backward()
        return {name: p.grad.clone() for name, p in generator.named_parameters()}

    state = {name: value.clone() for name, value in generator.state_dict().items()}
    gradients(first)
    place = sk.StaticLabelMap(first)
    gradients(place.label_map)
    expected = gradients(second)
    for name, value in gradients(place.copy_(second)).items():
        assert relative_error(value, expected[name]) < 1e-9, name
    unprepared = sk.StaticLabelMap(second)
    unprepared.label_map.windows((3, 3), 3, 1, 1)
    with pytest.raises(RuntimeError, match="run the network on the example before"):
        unprepared.copy_(first)


def test_pooled_maps_have_no_place():
    (mask,) = masks("blobs")
    with pytest.raises(ValueError, match="codebook of its own"):
        sk.StaticLabelMap(mask.avg_pool())
