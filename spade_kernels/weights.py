"""The weights of a SPADE layer's three convolutions, and their packed form."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spade_kernels import backends, ops
from spade_kernels.cache import Cache
from spade_kernels.condition import tap_responses
from spade_kernels.convolution import PackedConv2d, is_packable
from spade_kernels.label_map import LabelMap


class Weights(NamedTuple):
    """The three convolutions of a SPADE layer, each a pair of weight and bias, and how their results are used.

    Attributes:
        shared: (hidden, channels, k, k) and (hidden,). gamma, beta: (C, hidden, k, k) and (C,). All have one odd k.
        hidden_slope: negative slope of the leaky ReLU after the shared convolution; 0 is the paper's ReLU.
        scale_offset: the scale is scale_offset + gamma; 1 in the paper.
    """

    shared: tuple[Tensor, Tensor]
    gamma: tuple[Tensor, Tensor]
    beta: tuple[Tensor, Tensor]
    hidden_slope: float = 0.0
    scale_offset: float = 1.0

    @classmethod
    def of(
        cls, shared: nn.Conv2d, gamma: nn.Conv2d, beta: nn.Conv2d, hidden_slope: float = 0.0, scale_offset: float = 1.0
    ) -> Weights:
        """The weights of three convolutions; those without a bias get one of zeros."""

        def pair(conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
            return conv.weight, conv.weight.new_zeros(conv.out_channels) if conv.bias is None else conv.bias

        return cls(pair(shared), pair(gamma), pair(beta), hidden_slope, scale_offset)


class PackedWeights:
    """Packed weights of a frozen SPADE layer, reused across calls. Not differentiable.

    Tensors that depend on the kind of condition are computed at its first use and cached, except in compiled code.
    """

    def __init__(self, weights: Weights):
        self._weights = weights
        self.packed_weight = ops.pack_modulation_weight(weights.gamma[0].detach(), weights.beta[0].detach())
        acc_dtype = torch.promote_types(weights.gamma[1].dtype, torch.float32)
        self.hidden_bias = weights.shared[1].detach().to(acc_dtype, copy=True)
        self.bias = joint_bias(weights, acc_dtype)
        self._cache = Cache(shared=True)
        self._last_call: tuple | None = None
        self._rows: Tensor | None = None

    @property
    def is_traceable(self) -> bool:
        """True if calls do not change the object. The first calls of packed convolutions change it."""
        return not is_packable(self._weights.shared[0])

    def tap_responses(self, segmap: LabelMap) -> Tensor:
        """The shared convolution's tap responses, equal for all label maps with the same classes and edges."""
        weight = self._weights.shared[0]
        if segmap.is_pooled:
            return tap_responses(segmap, weight)
        kind = (segmap.num_labels, segmap.edges is not None)
        return self._cache.get(kind, lambda: tap_responses(segmap, weight), weight)

    def table(self, segmap: LabelMap, size: Sequence[int], build: Callable[[], Tensor]) -> Tensor:
        """The rows for a label map; from the third call in a row with the same one and size on, those of the second.

        Samplers of diffusion models make hundreds of such calls.
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

    def dense(self) -> tuple[PackedConv2d, PackedConv2d]:
        """The shared convolution, with its ReLU if it has one, and the joint one for gamma and beta, both packed."""
        return self._cache.get("dense", self._pack_dense, self.bias)

    def _pack_dense(self) -> tuple[PackedConv2d, PackedConv2d]:
        weight, bias = self._weights.shared
        joint, padding = joint_weight(self._weights), [weight.shape[-1] // 2] * 2
        relu = self._weights.hidden_slope == 0
        return PackedConv2d(weight, bias, padding, relu=relu), PackedConv2d(joint, self.bias, padding)


def check_weights(weights: Weights) -> None:
    """Raises ValueError unless the shapes of the weights and biases fit together."""
    shared, gamma, beta = (weight for weight, _ in weights[:3])
    hidden, _, k, _ = shared.shape
    wanted = (gamma.shape[0], hidden, k, k)
    if k % 2 == 0 or shared.shape[3] != k or gamma.shape != wanted or beta.shape != wanted:
        raise ValueError(
            f"shared {tuple(shared.shape)}, gamma {tuple(gamma.shape)} and beta {tuple(beta.shape)} weights must be "
            "(hidden, channels, k, k), (C, hidden, k, k) and (C, hidden, k, k) with the same odd k"
        )
    for name, (weight, bias) in zip(("shared", "gamma", "beta"), weights[:3], strict=True):
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"the bias of {name} must have shape ({len(weight)},), got {tuple(bias.shape)}")


def joint_weight(weights: Weights) -> Tensor:
    """(2C, hidden, k, k): the weights of gamma and beta as one convolution."""
    return torch.cat((weights.gamma[0], weights.beta[0]))


def joint_bias(weights: Weights, dtype: torch.dtype) -> Tensor:
    """(2C,): the bias of the joint convolution, which makes it give scale_offset + gamma and beta."""
    return torch.cat((weights.gamma[1].to(dtype) + weights.scale_offset, weights.beta[1].to(dtype)))
