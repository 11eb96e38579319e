"""Checkpoints: each is one safetensors file with checksums, replaced atomically. Loading never runs a file's code."""

from __future__ import annotations

import json
import pickle
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from spade_model.errors import UserError
from spade_model.files import replacing

_TENSOR = "__tensor__"
_TREE, _CHECKSUMS, _TENSORS = "tree", "checksums", "tensors"

# torch.load raises any of these exceptions for damaged files.
_DAMAGE = (
    RuntimeError,
    EOFError,
    OSError,
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    AssertionError,
    MemoryError,
    struct.error,
)


# Maps the names that entries have in old checkpoints, which can still be loaded, to their present names.
_RENAMED = {"G_average": "G_ema"}


def save(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists of tensors and plain values to `path`.

    The file is replaced atomically (see `files.replacing`).

    Raises:
        UserError: the folder cannot be written or the disk is full; the old file is untouched.
    """
    try:
        with replacing(path) as temporary:
            write(temporary, tree)
    except (OSError, SafetensorError) as error:
        kept = f"; the previous {path.name} is untouched" if path.exists() else ""
        raise UserError(
            f"could not save {path}: {error}{kept}. Free some space or choose another --checkpoints_dir"
        ) from error


def write(path: Path, tree: Mapping[str, Any]) -> None:
    """Writes nested dicts and lists as `save` does, but directly into `path`.

    Raises:
        OSError, SafetensorError: the file cannot be written.
    """
    tensors: dict[str, Tensor] = {}
    skeleton = _take_tensors(tree, "", tensors)
    save_file(tensors, path, metadata=_with_checksums(json.dumps(skeleton), tensors))


def load(path: Path) -> dict[str, Any]:
    """Reads the nested dicts and lists that `save` wrote; tensors are on the CPU.

    Raises:
        UserError: the file is missing, truncated, corrupt (a checksum differs), or not a training checkpoint.
    """
    with _open(path) as file:
        return _put_tensors(_read_tree(file, path), _checked_reader(file, path))


def load_part(path: Path, *parts: str) -> dict[str, Any]:
    """Reads only the top-level entries `parts` of a checkpoint; entries that it lacks are left out.

    Raises:
        UserError: see `load`.
    """
    with _open(path) as file:
        tree = _read_tree(file, path)
        read = _checked_reader(file, path)
        return {part: _put_tensors(tree[part], read) for part in parts if part in tree}


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Reads a plain state dict from .safetensors, or from a PyTorch file with `weights_only`, which never runs code.

    Raises:
        UserError: the file is missing, corrupt, or holds code or anything else but tensors.
    """
    return as_state_dict(read_weights(path), path)


def read_weights(path: Path) -> Any:
    """Reads a file like `read_state_dict`, but returns any content of a PyTorch file, such as nested dicts.

    Raises:
        UserError: the file is missing, corrupt, or holds code.
    """
    if path.suffix == ".safetensors":
        with _open(path) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a file, not a dict)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} was refused: it holds more than tensors, which could run code when loaded, or it is damaged. "
            "Ask its author for a plain state dict (.pth with weights only, or .safetensors)"
        ) from error
    except _DAMAGE as error:
        raise UserError(f"{path} is truncated or not a PyTorch file; copy or download it again") from error


def as_state_dict(content: Any, path: Path) -> dict[str, Tensor]:
    """Returns the names and tensors of a file's content, without the prefix `module.` that DataParallel adds.

    Raises:
        UserError: the content is no dict of tensors, or two names differ in the prefix only.
    """
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"{path} does not hold a state dict (names and tensors)")
    state = {str(name).removeprefix("module."): tensor for name, tensor in content.items()}
    if len(state) < len(content):
        raise UserError(f"{path} holds two networks: some names occur both with and without the prefix module.")
    return state


def load_into(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Calls `module.load_state_dict`, with a readable error when the state does not fit.

    Raises:
        UserError: see `require_fit`.
    """
    require_fit(module, state, source)
    module.load_state_dict(dict(state))


def require_fit(module: torch.nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Checks that `module.load_state_dict` can load the state and keeps its values.

    Raises:
        UserError: the state belongs to another architecture; the message names the first differences.
    """
    own = module.state_dict()
    differences = [f"{k} is missing" for k in own if k not in state]
    differences += [f"{k} is not expected" for k in state if k not in own]
    both = {k: v for k, v in own.items() if k in state}
    differences += [
        f"{k} has shape {tuple(state[k].shape)}, the network {tuple(v.shape)}"
        for k, v in both.items()
        if state[k].shape != v.shape
    ]
    differences += [
        f"{k} has dtype {state[k].dtype}, the network {v.dtype}"
        for k, v in both.items()
        if state[k].is_floating_point() != v.is_floating_point() or state[k].is_complex()
    ]
    if differences:
        more = f" and {len(differences) - 3} more" if len(differences) > 3 else ""
        raise UserError(
            f"{source} belongs to another architecture: {'; '.join(differences[:3])}{more}. "
            "Use the options it was trained with (label_nc, no_instance, output_nc, ngf, norm_G, "
            "num_upsampling_layers, use_vae)"
        )


@contextmanager
def _open(path: Path) -> Iterator[Any]:
    """Opens a safetensors file; every error inside the context while the file is read becomes a UserError."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            yield file
    except (SafetensorError, OSError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} is truncated or not a safetensors file ({error}); use an earlier checkpoint"
        ) from error


def _with_checksums(tree: str, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Returns a file's metadata: the tree, and the checksums of the tree and of each tensor."""
    checksums = {name: _checksum(tensor) for name, tensor in tensors.items()}
    return {_TREE: tree, _CHECKSUMS: json.dumps({_TREE: zlib.crc32(tree.encode()), _TENSORS: checksums})}


def _checksum(tensor: Tensor) -> int:
    """Returns the CRC-32 of a contiguous CPU tensor's bytes, dtype and shape."""
    kind = f"{tensor.dtype} {tuple(tensor.shape)}".encode()
    return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, zlib.crc32(kind))


def _checked_reader(file: Any, path: Path) -> Callable[[str], Tensor]:
    """Returns a function that reads a tensor and compares it with its checksum, if the file's version has checksums."""
    checksums = json.loads(file.metadata().get(_CHECKSUMS, "null"))

    def read(name: str) -> Tensor:
        tensor = file.get_tensor(name)
        if checksums is not None and _checksum(tensor) != checksums[_TENSORS][name]:
            raise UserError(f"{path} is damaged: {name} differs from its checksum; use an earlier checkpoint")
        return tensor

    return read


def _read_tree(file: Any, path: Path) -> dict[str, Any]:
    metadata = file.metadata() or {}
    if _TREE not in metadata:
        raise UserError(
            f"{path} is not a training checkpoint: it has no saved state beside its tensors; pass a file that "
            "`spade train` wrote"
        )
    checksums = json.loads(metadata.get(_CHECKSUMS, "null"))
    if checksums is not None and zlib.crc32(metadata[_TREE].encode()) != checksums[_TREE]:
        raise UserError(f"{path} is damaged: its saved state differs from its checksum; use an earlier checkpoint")
    try:
        tree = json.loads(metadata[_TREE])
    except ValueError as error:
        raise UserError(
            f"{path} is damaged: its saved state is not JSON ({error}); use an earlier checkpoint"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a training checkpoint: its saved state is {type(tree).__name__}, not options")
    return {_RENAMED.get(str(name), str(name)): value for name, value in tree.items()}


def _take_tensors(tree: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(tree, Tensor):
        tensors[name] = tree.detach().cpu().contiguous().clone()
        return {_TENSOR: name}
    if isinstance(tree, Mapping):
        # JSON keys are strings; Adam's state is keyed by parameter number.
        keys = {str(k): type(k).__name__ for k in tree}
        numbers = all(kind == "int" for kind in keys.values()) and bool(keys)
        items = {str(k): _take_tensors(v, f"{name}/{k}".lstrip("/"), tensors) for k, v in tree.items()}
        return {"__numbered__": items} if numbers else items
    if isinstance(tree, (list, tuple)):
        return [_take_tensors(v, f"{name}/{i}".lstrip("/"), tensors) for i, v in enumerate(tree)]
    return tree


def _put_tensors(tree: Any, read) -> Any:
    if isinstance(tree, dict):
        if _TENSOR in tree:
            return read(tree[_TENSOR])
        if "__numbered__" in tree:
            return {int(k): _put_tensors(v, read) for k, v in tree["__numbered__"].items()}
        return {k: _put_tensors(v, read) for k, v in tree.items()}
    if isinstance(tree, list):
        return [_put_tensors(v, read) for v in tree]
    return tree
