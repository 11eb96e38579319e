"""The trials of `make soak`, in short."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from soak.damage import PICKLES, checkpoints, pickles
from soak.data import FAULTS, data_sets
from soak.kills import kills
from soak.memory import memory
from soak.places import full_disk, jumping_clock, two_at_once, vanished_data

SHORT: dict[str, Callable[[Path], dict[str, Any]]] = {
    "kill -9": partial(kills, count=2, steps=10),
    "damaged checkpoints": partial(checkpoints, count=26),
    "hostile pickles": pickles,
    "broken data sets": data_sets,
    "memory": partial(memory, steps=20, compare=False),
    "full disk": partial(full_disk, count=1),
    "vanished data": partial(vanished_data, count=1),
    "jumping clock": partial(jumping_clock, steps=8),
    "two runs at once": partial(two_at_once, count=1),
}


@pytest.mark.parametrize("trial", SHORT)
def test_trial(tmp_path, trial):
    assert SHORT[trial](tmp_path)


def test_the_numbers_that_are_promised():
    assert len(PICKLES) == 20
    assert len(FAULTS) >= 40
