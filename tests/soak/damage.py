"""Truncated and bit-flipped checkpoints, and pickles that would run code."""

from __future__ import annotations

import builtins
import dataclasses
import functools
import io
import logging
import operator
import os
import pickle
import random
import runpy
import shutil
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from test_train import flat, small_config

from spade_model import checkpoint
from spade_model.errors import UserError
from spade_model.training import train


def checkpoints(folder: Path, count: int) -> dict[str, int]:
    """Damages a saved state `count` times: the file is refused with a message that names it, or read unchanged.

    With every 25th file, if it is refused, training is continued: the message names the newest epoch that is intact,
    and the run goes on from there.
    """
    chance, counts = random.Random(0), {"truncated": 0, "bit-flipped": 0, "refused": 0, "read the same": 0, "healed": 0}
    run = train(small_config(folder, max_steps=8, save_epoch_freq=1))
    file = run / "latest.safetensors"
    whole, right = file.read_bytes(), flat(checkpoint.load(file))
    for number in range(count):
        data = bytearray(whole)
        if number % 2:
            del data[chance.randrange(len(data)) :]
            counts["truncated"] += 1
        else:
            # Half of the flips are in the header, which is a small part of the file, but the only one with a structure.
            end = 10_000 if number % 4 else len(data)
            data[chance.randrange(end)] ^= 1 << chance.randrange(8)
            counts["bit-flipped"] += 1
        file.write_bytes(data)
        message = _refusal(checkpoint.load, file)
        if message is None:
            found = flat(checkpoint.load(file))
            assert found.keys() == right.keys(), f"damage {number} was not seen"
            assert all(torch.equal(found[name], right[name]) for name in right), f"damage {number} was not seen"
            counts["read the same"] += 1
            continue
        assert str(file) in message, message
        counts["refused"] += 1
        if number % 25 == 0:
            _heal(folder, file)
            counts["healed"] += 1
    return counts


def _refusal(read: Callable[[Path], Any], file: Path) -> str | None:
    """Returns the message with which a file is refused; None if it is read."""
    try:
        read(file)
    except UserError as error:
        return str(error)
    return None


def _heal(folder: Path, file: Path) -> None:
    config = small_config(folder, max_steps=9, save_epoch_freq=1, continue_train=True)
    message = _refusal(lambda path: train(config), file)
    assert message is not None, f"{file} is damaged and was continued"
    assert str(file) in message, message
    assert "--which_epoch 1 is the newest" in message, message
    train(dataclasses.replace(config, which_epoch="1"))
    assert checkpoint.load(file)["steps"] == 9


class _Calls:
    """An object that calls a function when it is unpickled."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self._call = function, arguments

    def __reduce__(self):
        return self._call


def _nested(canary: str) -> bytes:
    return pickle.dumps(_Calls(os.mkdir, canary))


def _archive(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def _script(canary: str) -> str:
    path = Path(canary).with_name("script.py")
    path.write_text(f"import os\nos.mkdir({canary!r})\n")
    return str(path)


_CODE = "__import__('os').mkdir({!r})"
PICKLES: dict[str, Callable[[str], bytes]] = {
    "os.mkdir": _nested,
    "os.system": lambda c: pickle.dumps(_Calls(os.system, f"mkdir {c}")),
    "eval": lambda c: pickle.dumps(_Calls(eval, _CODE.format(c))),
    "exec": lambda c: pickle.dumps(_Calls(exec, _CODE.format(c))),
    "open": lambda c: pickle.dumps(_Calls(builtins.open, c, "w")),
    "attribute": lambda c: pickle.dumps(_Calls(operator.attrgetter("a.b"), c)),
    "process": lambda c: pickle.dumps(_Calls(subprocess.Popen, ["mkdir", c])),
    "partial": lambda c: pickle.dumps(_Calls(functools.partial(os.mkdir, c))),
    "methodcaller": lambda c: pickle.dumps(_Calls(operator.methodcaller("mkdir"), Path(c))),
    "path": lambda c: pickle.dumps(_Calls(Path.touch, Path(c))),
    "copy": lambda c: pickle.dumps(_Calls(shutil.copytree, os.path.dirname(c), c)),
    "log file": lambda c: pickle.dumps(_Calls(logging.FileHandler, c)),
    "script": lambda c: pickle.dumps(_Calls(runpy.run_path, _script(c))),
    "pickle in a pickle": lambda c: pickle.dumps(_Calls(pickle.loads, _nested(c))),
    "torch's loader of bytes": lambda c: pickle.dumps(_Calls(torch.storage._load_from_bytes, _nested(c))),
    "numpy's loader": lambda c: pickle.dumps(_Calls(np.load, io.BytesIO(_nested(c)), None, True)),
    "among tensors": lambda c: _archive({"a": torch.ones(2), "b": _Calls(os.mkdir, c)}),
    "as a name": lambda c: _archive({_Calls(str, c): torch.ones(2)}),
    "old protocol": lambda c: pickle.dumps({"a": _Calls(os.mkdir, c)}, protocol=0),
    "too large a tensor": lambda c: pickle.dumps(_Calls(torch.empty, 2**50)),
}


def pickles(folder: Path, count: int = len(PICKLES)) -> dict[str, int]:
    """Reads hostile pickles as weights and as a state: each file is refused by its name, and none of its code runs."""
    run = train(small_config(folder, max_steps=1))
    canary = folder / "canary"
    warnings.filterwarnings("ignore", "Detected pickle protocol")
    for name in list(PICKLES)[:count]:
        content = PICKLES[name](str(canary))
        for file, read in (
            (folder / "latest_net_G.pth", checkpoint.read_state_dict),
            (run / "latest.safetensors", checkpoint.load),
        ):
            file.write_bytes(content)
            message = _refusal(read, file)
            assert message is not None, f"{name}: {file.name} was read"
            assert str(file) in message, f"{name}: {message}"
            assert not canary.exists(), f"{name}: {file.name} ran its code"
    return {"pickles": count, "refused as weights and as a state": count}
