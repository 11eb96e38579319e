"""Detection of label maps in one-hot float tensors, which users of SPADE layers often pass."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.weak import WeakTensorKeyDictionary

from spade_kernels import transforms
from spade_kernels.label_map import LabelMap, is_one_hot_of, read_constant_and_one_hot, read_one_hot

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_Stamp = tuple[int, int]


class _Answer(NamedTuple):
    label_map: LabelMap | None
    stamp: _Stamp | None


# Keys are tensors, compared by identity; the dict does not keep them alive.
_answers = WeakTensorKeyDictionary()
_last: list[LabelMap] = []


def detect_one_hot(planes: Tensor) -> LabelMap | None:
    """The label map with exactly these condition vectors, or None.

    The result is cached for the tensor until its version counter or address changes, so that the layers of one forward
    pass share one label map. Changes that do not raise the counter, through `.data` or another library's view of the
    memory, go unnoticed in a tensor that PyTorch allocated.

    Args:
        planes: (N, C, H, W) float. The last plane is read as the instance boundary, even if it is a class: a pixel with
            its only 1 there has the same condition vector as "no class" on a boundary.

    Returns:
        The label map. It is None if a pixel has two classes or a value other than 0 and 1, if gradients for the planes
        are needed, and if the call is being traced or captured, so that values are not known.
    """
    if not _can_be_read(planes):
        return None
    answer, stamp = _answers.get(planes), _stamp(planes)
    if answer is not None and _still_holds(answer, planes, stamp):
        return answer.label_map
    with transforms.outside():
        label_map = _seen_before(_read(planes))
    _answers[planes] = _Answer(label_map, stamp)
    return label_map


def _read(planes: Tensor) -> LabelMap | None:
    few = _sample(planes)
    binary = ((few == 0) | (few == 1)).flatten(2).all(2).all(0)
    if bool(binary.all()):
        return read_one_hot(planes, edges=planes.shape[1] > 1)
    constant = (few == few[:, :, :1, :1]).flatten(2).all(2).all(0)
    return read_constant_and_one_hot(planes) if bool((constant | binary).all()) else None


def _seen_before(label_map: LabelMap | None) -> LabelMap | None:
    """The last label map if it is equal: it has its window indexes, and frozen layers have their tables of it.

    Samplers of diffusion models make a new tensor of the same mask in every step.
    """
    last, _last[:] = list(_last), []
    if label_map is None or torch.is_grad_enabled():
        return label_map
    _last.append(last[0] if last and last[0].equals(label_map) else label_map)
    return _last[0]


def _can_be_read(planes: Tensor) -> bool:
    if _is_traced(planes) or type(planes) is not Tensor or planes.layout != torch.strided:
        return False
    if planes.is_meta or planes.dtype not in _DTYPES or not planes.numel():
        return False
    return not (planes.requires_grad and torch.is_grad_enabled()) and forward_ad._current_level < 0


def _is_traced(planes: Tensor) -> bool:
    # A CUDA graph captured with this mask's windows would use them for every later mask.
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._functorch.is_functorch_wrapped_tensor(planes)
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        or torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
        or (planes.is_cuda and torch.cuda.is_current_stream_capturing())
    )


def _stamp(planes: Tensor) -> _Stamp | None:
    """(version counter, address) of the tensor; None where the counter can miss changes.

    That is so in inference mode, in shared memory, and in memory that PyTorch did not allocate.
    """
    # Another process that writes to shared memory has a version counter of its own.
    if planes.is_inference() or planes.is_shared() or not planes.untyped_storage().resizable():
        return None
    return planes._version, planes.data_ptr()


def _still_holds(answer: _Answer, planes: Tensor, stamp: _Stamp | None) -> bool:
    if stamp is not None:
        return answer.stamp == stamp
    if answer.label_map is None or not answer.label_map.is_pooled:
        return answer.label_map is not None and is_one_hot_of(planes, answer.label_map)
    return torch.equal(planes, answer.label_map.one_hot(planes.dtype))


def _sample(planes: Tensor) -> Tensor:
    """At most 64 pixels of each image, which tell features and photographs from label maps."""
    rows, columns = (-(-size // 8) for size in planes.shape[2:])
    return planes[:, :, ::rows, ::columns]
