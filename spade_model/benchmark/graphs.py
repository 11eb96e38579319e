"""On a GPU the generator's providers are CUDA graphs, which read masks at a fixed place."""

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
    """Returns the stock network that a provider is made of."""
    variants: dict[str, Variant] = {"original": "eager", "spade-free": "spade-free"}
    return variants.get(name, "tuned")


def static_mask(example: LabelMap) -> LabelMap:
    """Returns a copy for `filled`; the stock networks read its labels and edges alone."""
    edges = None if example.edges is None else example.edges.clone()
    return LabelMap(example.labels.clone(), example.num_labels, edges)


def filled(static: LabelMap, run: Callable[[], Tensor]) -> Run:
    """Returns the run of a function that reads `static`, into which it copies each mask."""

    def with_mask(mask: LabelMap) -> Tensor:
        static.labels.copy_(mask.labels)
        if static.edges is not None and mask.edges is not None:
            static.edges.copy_(mask.edges)
        return run()

    return with_mask


def preparation(generator: SPADEGenerator, gradients: bool) -> Callable[[LabelMap], LabelMap]:
    """Returns a function that builds all indexes that the generator asks a label map for."""

    def prepare(mask: LabelMap) -> LabelMap:
        return mask.prepare(generator.resolutions(), gradients=gradients)

    return prepare


def our_runs(
    run: Callable[[], Tensor],
    place: StaticLabelMap,
    found: Sequence[LabelMap],
    prepare: Callable[[LabelMap], LabelMap],
) -> dict[str, Run]:
    """Returns ours with everything, with indexes made ahead, and the graph alone (of the mask filled in last).

    Args:
        run: reads `place.label_map`.
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
