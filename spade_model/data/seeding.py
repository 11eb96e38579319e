"""Independent random streams: every random choice is a pure function of the seed and what it is for."""

from __future__ import annotations

import numpy as np

EPOCH_ORDER = 0
ITEM_AUGMENTATION = 1
TOY_IMAGE = 2


def random_stream(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """The generator of one purpose (a constant above) and key, such as (epoch, index); all not negative."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *key)))
