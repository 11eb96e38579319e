"""Independent random streams, which depend only on the seed, a purpose and a key."""

from __future__ import annotations

import numpy as np

EPOCH_ORDER = 0
ITEM_AUGMENTATION = 1
TOY_IMAGE = 2


def random_stream(seed: int, purpose: int, *key: int) -> np.random.Generator:
    """Returns the generator for a purpose (a constant above) and a key such as (epoch, index).

    No argument may be negative.
    """
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(purpose, *key)))
