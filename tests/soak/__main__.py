"""Runs all trials and writes their counts to soak.json. At full size this takes an hour.

    python -m soak [--share 1.0] [--out benchmarks/results]

The exit status is 1 if a trial went wrong; the others run nevertheless.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from soak.damage import PICKLES, checkpoints, pickles
from soak.data import FAULTS, data_sets
from soak.kills import kills
from soak.memory import memory
from soak.places import full_disk, jumping_clock, two_at_once, vanished_data


def trials(share: float) -> dict[str, Callable[[Path], dict[str, Any]]]:
    """Returns the trials by name; `share` scales the number of repetitions or steps of each."""

    def size(full: int) -> int:
        return max(1, round(share * full))

    return {
        "kill -9": partial(kills, count=size(200)),
        "damaged checkpoints": partial(checkpoints, count=size(500)),
        "hostile pickles": partial(pickles, count=size(len(PICKLES))),
        "broken data sets": partial(data_sets, count=size(len(FAULTS))),
        "memory": partial(memory, steps=size(10_000), compare=share >= 0.2),
        "full disk": partial(full_disk, count=size(20)),
        "vanished data": partial(vanished_data, count=size(20)),
        "jumping clock": partial(jumping_clock, steps=size(200)),
        "two runs at once": partial(two_at_once, count=size(20)),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="share of the full number of trials")
    parser.add_argument("--out", type=Path, default=Path("build"), help="folder for soak.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {"date": datetime.date.today().isoformat(), "device": platform.machine()}
    result |= {"torch": torch.__version__, "share": options.share, "trials": {}}
    failed = False
    for name, trial in trials(options.share).items():
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                found = trial(Path(folder))
            except Exception as error:
                traceback.print_exc()
                found, failed = {"failed": str(error)}, True
        result["trials"][name] = {"seconds": round(time.monotonic() - started), **found}
        print(f"{name}: {result['trials'][name]}", flush=True)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "soak.json").write_text(json.dumps(result, indent=2) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
