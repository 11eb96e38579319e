"""The weights of a SPADE layer's three convolutions, and their packed form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spade_kernels import backends, ops
from spade_kernels.cache import Cache
from spade_kernels.condition import tap_responses
from spade_kernels.convolution import PackedConv2d, is_packable
from spade_kernels.label_map import LabelMap


class Weights(NamedTuple):
    """The three convolutions of a SPADE layer, each a pair of weight and bias, and how their results are used.

    Attributes:
        shared: (hidden, channels, k, k) and (hidden,); None for layers without a hidden layer, whose gamma and beta are
            convolutions of the condition.
        gamma, beta: (C, hidden, k, k) and (C,), or (C, channels, k, k) without a hidden layer. All have the
            same odd k.
        hidden_slope: negative slope of the leaky ReLU after the shared convolution; 0 is the paper's ReLU.
        scale_offset: the scale is scale_offset + gamma; 1 in the paper.
        padding_mode: "zeros" as in the paper, or "reflect": the input of every convolution is reflected at its border,
            and the convolutions are evaluated at every pixel.
    """

    shared: tuple[Tensor, Tensor] | None
    gamma: tuple[Tensor, Tensor]
    beta: tuple[Tensor, Tensor]
    hidden_slope: float = 0.0
    scale_offset: float = 1.0
    padding_mode: str = "zeros"

    @property
    def channels(self) -> int:
        """Channels of the condition."""
        return (self.shared or self.gamma)[0].shape[1]

    @property
    def kernel_size(self) -> int:
        return self.gamma[0].shape[-1]

    @property
    def dtype(self) -> torch.dtype:
        return self.gamma[0].dtype


class PackedWeights:
    """Packed weights of a frozen SPADE layer, reused across calls. They are not differentiable.

    Tensors that depend on the kind of condition are computed when that kind is first used, and cached, except in
    compiled code.
    """

    def __init__(self, weights: Weights):
        self.weights = weights
        acc_dtype = torch.promote_types(weights.gamma[1].dtype, torch.float32)
        self.bias = joint_bias(weights, acc_dtype)
        self.hidden_bias: Tensor | None = None
        self.packed_weight: Tensor | None = None
        if weights.shared is not None:
            self.hidden_bias = weights.shared[1].detach().to(acc_dtype, copy=True)
            self.packed_weight = ops.pack_modulation_weight(weights.gamma[0].detach(), weights.beta[0].detach())
        self._cache = Cache(shared=True)
        self._last_call: tuple | None = None
        self._rows: Tensor | None = None

    @property
    def is_traceable(self) -> bool:
        """True if calls do not change the object. The first calls of packed convolutions change it."""
        return not is_packable(self.weights.gamma[0])

    def tap_responses(self, segmap: LabelMap) -> Tensor:
        """Returns the tap responses of the first convolution.

        They are equal for all label maps that have the same number of classes and either all have edges or none.
        """
        weight = first_weight(self.weights)
        if segmap.is_pooled:
            return tap_responses(segmap, weight)
        kind = (segmap.num_labels, segmap.edges is not None)
        return self._cache.get(kind, lambda: tap_responses(segmap, weight), weight)

    def table(self, segmap: LabelMap, size: Sequence[int], build: Callable[[], Tensor]) -> Tensor:
        """Returns the table's rows for a label map, made by `build` unless they are kept.

        The second of consecutive calls with the same label map and size keeps its rows for those that follow. Samplers
        of diffusion models make hundreds of such calls.
        """
        codes = segmap.codes
        if torch.compiler.is_compiling() or backends.is_captured(codes) or codes.is_inference():
            return build()
        call = (weakref.ref(segmap), codes._version, tuple(size))
        last, self._last_call = self._last_call, call
        if last != call:
            self._rows = None
            return build()
        if self._rows is None:
            self._rows = build()
            backends.synchronize(self._rows)
        return self._rows

    def dense(self) -> tuple[PackedConv2d | None, PackedConv2d]:
        """Returns the packed shared convolution, with its ReLU if any, and the packed joint one of gamma and beta.

        The first is None if there is no hidden layer.
        """
        return self._cache.get("dense", self._pack_dense, self.bias)

    def _pack_dense(self) -> tuple[PackedConv2d | None, PackedConv2d]:
        padding, relu = zero_padding(self.weights), self.weights.hidden_slope == 0
        shared = self.weights.shared
        first = None if shared is None else PackedConv2d(*shared, padding, relu=relu)
        return first, PackedConv2d(joint_weight(self.weights), self.bias, padding)


def check_weights(weights: Weights) -> None:
    """Raises ValueError unless the shapes of the weights and biases fit together."""
    pairs = {"gamma": weights.gamma, "beta": weights.beta}
    if weights.shared is not None:
        pairs = {"shared": weights.shared} | pairs
    gamma, k = weights.gamma[0], weights.kernel_size
    first = pairs.get("shared", weights.gamma)[0]
    inputs = gamma.shape[1] if weights.shared is None else len(first)
    wanted = (gamma.shape[0], inputs, k, k)
    if k % 2 == 0 or first.shape[2:] != (k, k) or gamma.shape != wanted or weights.beta[0].shape != wanted:
        shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, (weight, _) in pairs.items())
        raise ValueError(
            f"the weights have shapes {shapes}; they must be (hidden, channels, k, k), (C, hidden, k, k) and "
            "(C, hidden, k, k) with the same odd k, or without a hidden layer (C, channels, k, k) twice"
        )
    for name, (weight, bias) in pairs.items():
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of {name} must have shape ({len(weight)},), got {tuple(bias.shape)}")
    if weights.padding_mode not in ("zeros", "reflect"):
        raise ValueError(f"padding_mode must be 'zeros' or 'reflect', got {weights.padding_mode!r}")


def first_weight(weights: Weights) -> Tensor:
    """Returns the weight of the condition's convolution: the shared one, or the joint one without a hidden layer."""
    return joint_weight(weights) if weights.shared is None else weights.shared[0]


def zero_padding(weights: Weights) -> list[int]:
    """Returns the rows and columns of zeros on each side of the convolutions' inputs."""
    return [weights.kernel_size // 2 if weights.padding_mode == "zeros" else 0] * 2


def joint_weight(weights: Weights) -> Tensor:
    """Returns the weights of gamma and beta as those of one convolution, (2C, hidden, k, k)."""
    return torch.cat((weights.gamma[0], weights.beta[0]))


def joint_bias(weights: Weights, dtype: torch.dtype) -> Tensor:
    """Returns the bias (2C,) with which the joint convolution computes scale_offset + gamma, and beta."""
    return torch.cat((weights.gamma[1].to(dtype) + weights.scale_offset, weights.beta[1].to(dtype)))
