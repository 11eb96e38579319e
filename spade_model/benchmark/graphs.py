"""Networks for the GPU benchmarks that run as CUDA graphs. A graph reads its mask from tensors at a fixed address."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from spade_kernels import LabelMap, StaticLabelMap
from spade_model.benchmark.clock import Captured
from spade_model.benchmark.masks import fresh
from spade_model.benchmark.providers import Run
from spade_model.benchmark.stock import Variant
from spade_model.networks import SPADEGenerator


def variant(name: str) -> Variant:
    """Returns the variant of the stock network that the provider `name` runs."""
    variants: dict[str, Variant] = {"original": "eager", "spade-free": "spade-free"}
    return variants.get(name, "tuned")


def static_mask(example: LabelMap) -> LabelMap:
    """Returns a copy of a mask for `filled`. It has no window indexes: stock networks read only labels and edges."""
    edges = None if example.edges is None else example.edges.clone()
    return LabelMap(example.labels.clone(), example.num_labels, edges)


def filled(static: LabelMap, run: Callable[[], Tensor]) -> Run:
    """Returns a function that copies its mask into `static` and then calls `run`, which reads `static`."""

    def with_mask(mask: LabelMap) -> Tensor:
        static.labels.copy_(mask.labels)
        if static.edges is not None and mask.edges is not None:
            static.edges.copy_(mask.edges)
        return run()

    return with_mask


def preparation(generator: SPADEGenerator, gradients: bool) -> Callable[[LabelMap], LabelMap]:
    """Returns a function that builds all window indexes that the generator needs of a label map."""

    def prepare(mask: LabelMap) -> LabelMap:
        return mask.prepare(generator.resolutions(), gradients=gradients)

    return prepare


def our_runs(
    run: Callable[[], Tensor],
    place: StaticLabelMap,
    found: Sequence[LabelMap],
    prepare: Callable[[LabelMap], LabelMap],
) -> dict[str, Run]:
    """Captures a network of this package as one CUDA graph; returns three functions that replay it.

    "ours" builds the window indexes of its mask and copies the mask into `place` first. "ours-indexed" copies a mask
    whose indexes were built beforehand. "ours-replay" replays the graph on the mask that was copied last.

    Args:
        run: calls the network on `place.label_map`.
        found: the masks with which "ours-indexed" can be called.
    """
    graph = Captured(run, place.label_map.device)
    indexed = {id(mask): prepare(fresh(mask)) for mask in found}

    def whole(mask: LabelMap) -> Tensor:
        place.copy_(fresh(mask))
        return graph()

    def ahead(mask: LabelMap) -> Tensor:
        place.copy_(indexed[id(mask)])
        return graph()

    return {"ours": whole, "ours-indexed": ahead, "ours-replay": lambda mask: graph()}
