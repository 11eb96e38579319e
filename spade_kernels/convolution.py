"""The convolution of a residual block: spectral norm does not rescale its weight, and freezing packs the weight."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from spade_kernels import backends, ops, transforms
from spade_kernels.freezing import Freezable
from spade_kernels.modulation import DeferredModulation
from spade_kernels.normalization import has_hooks

_EPS = 1e-12


class Conv2d(Freezable, nn.Conv2d):
    """`nn.Conv2d` with stride 1, optionally with spectral norm (Miyato et al. 2018).

    Parameters, buffers and state_dict keys are those of `nn.Conv2d`, or of `torch.nn.utils.spectral_norm` around it
    (`weight_orig`, `weight_u`, `weight_v`). With spectral norm, reading `weight` computes the normalized weight.

    Dividing the weight by its spectral norm sigma takes passes over the weight in every training step. The caller saves
    these passes by multiplying the input by 1 / sigma instead, as a SPADE layer does on its small table:
    `weight_and_inv_sigma()` returns the weight and 1 / sigma, and `forward(x, weight)` uses the given weight without
    dividing it.
    """

    weight_orig: nn.Parameter
    weight_u: Tensor
    weight_v: Tensor

    def __init__(
        self, fin: int, fout: int, kernel_size: int, *, padding: int = 0, bias: bool = True, spectral: bool = False
    ):
        super().__init__(fin, fout, kernel_size, padding=padding, bias=bias)
        self.spectral = spectral
        if not spectral:
            return
        weight = self._parameters.pop("weight")
        assert weight is not None
        self.register_parameter("weight_orig", weight)
        self.register_buffer("weight_u", F.normalize(torch.randn(fout), dim=0, eps=_EPS))
        self.register_buffer("weight_v", F.normalize(torch.randn(weight[0].numel()), dim=0, eps=_EPS))

    def __getattr__(self, name: str) -> Any:
        if name == "weight" and self.__dict__.get("spectral", False):
            return self._over_norm()
        return super().__getattr__(name)

    def weight_and_inv_sigma(self) -> tuple[Tensor | None, Tensor | None]:
        """The weight and 1 / sigma, such that `forward(x * inv_sigma, weight)` equals `forward(x)`.

        Each call makes one power iteration. Both results have derivatives of every order, and 1 / sigma is positive.

        Returns:
            (None, None) in evaluation mode and without spectral norm: call `forward(x)` then.
        """
        if not (self.spectral and self.training):
            return None, None
        weight = self.weight_orig
        return _with_inv_sigma(weight, *self._iterate(weight))

    def forward(
        self, x: Tensor | DeferredModulation, weight: Tensor | None = None, add: Tensor | None = None
    ) -> Tensor:
        """(N, fin, h, w) -> (N, fout, h', w').

        Args:
            x: tensor or deferred modulation to convolve.
            weight: from `weight_and_inv_sigma`, if x has been multiplied by the 1 / sigma from the same call; None for
                the module's own normalized weight.
            add: added to the result, (N, fout, h', w').
        """
        if weight is None:
            packed = self.packed() if is_plain(self, Conv2d) else None
            if packed is not None:
                return packed(x, add)
            weight = self._normalized()
        x = x.tensor() if isinstance(x, DeferredModulation) else x
        if not has_stride_1_and_zero_padding(self):
            y = self._conv_forward(x, weight, self.bias)
        else:
            y = convolve_channels_last(x, weight, self.bias, self.padding)  # type: ignore[arg-type]
        return y if add is None else y + add

    def pack(self) -> PackedConv2d | None:
        if not is_plain(self, Conv2d):
            return None
        return PackedConv2d(self._normalized().detach(), self.bias, self.padding)  # type: ignore[arg-type]

    def _normalized(self) -> Tensor:
        weight, inv_sigma = self.weight_and_inv_sigma()
        return self.weight if weight is None or inv_sigma is None else weight * inv_sigma

    def _over_norm(self) -> Tensor:
        """The weight divided by its spectral norm, which u and v of the last power iteration give."""
        # float32 is used, because rounding sigma would scale the whole result.
        original = self.weight_orig
        acc_dtype = torch.promote_types(original.dtype, torch.float32)
        weight, u, v = (t.to(acc_dtype) for t in (original, self.weight_u, self.weight_v))
        return (weight / torch.dot(u, torch.mv(weight.flatten(1), v))).to(original.dtype)

    @torch.no_grad()
    def _iterate(self, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Makes one power iteration. Returns u, v and 1 / sigma, where sigma = u . (W v)."""
        if transforms.are_active() and transforms.unwrapped(self.weight_u) is self.weight_u:
            # The buffers are not part of the transform, so the values that are written into them must not be, either.
            value = transforms.unwrapped(weight)
            if value is not None and value is not weight:
                with transforms.outside():
                    return self._iterate(value)
        matrix = weight.flatten(1)
        # Autocast would copy the matrix twice and round it, and sigma with it. The meta device has no autocast.
        with contextlib.nullcontext() if matrix.is_meta else torch.autocast(matrix.device.type, enabled=False):
            v = F.normalize(torch.mv(matrix.t(), self.weight_u), dim=0, eps=_EPS)
            product = torch.mv(matrix, v)
            u = F.normalize(product, dim=0, eps=_EPS)
            sigma = torch.dot(u, product)
        self.weight_u.copy_(u)
        self.weight_v.copy_(v)
        return u, v, sigma.reciprocal()


def runs_as(module: nn.Module, kind: type[nn.Conv2d]) -> TypeGuard[nn.Conv2d]:
    """True if a call of the module is the convolution of class `kind` and nothing else.

    A parametrized weight is allowed: reading the weight computes it.
    """
    if not isinstance(module, kind) or has_hooks(module) or "_conv_forward" in module.__dict__:
        return False
    return type(module).forward is kind.forward and type(module)._conv_forward is kind._conv_forward


def is_plain(module: nn.Module, kind: type[nn.Conv2d] = nn.Conv2d) -> TypeGuard[nn.Conv2d]:
    """True if the module `runs_as` a convolution of class `kind` with stride 1 and zero padding."""
    return runs_as(module, kind) and has_stride_1_and_zero_padding(module)


def has_stride_1_and_zero_padding(conv: nn.Conv2d) -> bool:
    """True of a convolution that `convolve` can do."""
    settings = conv.stride, conv.dilation, conv.groups, conv.padding_mode
    return settings == ((1, 1), (1, 1), 1, "zeros") and not isinstance(conv.padding, str)


# Fewest pixels of a batch for a Winograd convolution. From this number on, transforming the weight in every call pays,
# and the weight's gradient is within the error budget. With fewer pixels, a direct convolution is more accurate.
_PIXELS = 32 * 32
# Most channels for a channels-last convolution in oneDNN: more in one sum exceed the error budget.
_CHANNELS = 64


def convolve(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """`F.conv2d` with stride 1, computed by `ops.conv3x3` where that is faster. All tensors have derivatives."""
    if _suits_winograd(x, weight, padding):
        return ops.conv3x3(x, weight, weight.new_zeros(len(weight)) if bias is None else bias)
    return F.conv2d(x, weight, bias, padding=padding)


def convolve_channels_last(x: Tensor, weight: Tensor, bias: Tensor | None, padding: Sequence[int]) -> Tensor:
    """`convolve`, or a convolution in NCHW where that is faster or more exact; the result is channels-last."""
    if _suits_nchw(x, weight, padding):
        y = F.conv2d(x.contiguous(), weight, bias, padding=padding)
        return y.contiguous(memory_format=torch.channels_last)
    return convolve(x, weight, bias, padding)


def _suits_nchw(x: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """True if oneDNN's NCHW convolution is worth the copies of x and the result between memory formats.

    oneDNN's channels-last convolution copies the weight, which is larger than small feature maps. It also adds up all
    channels in one sum: with 128 channels its error is 2.7 times as large.
    """
    if torch.compiler.is_compiling() or transforms.are_active() or x.dim() != 4:
        return False
    if x.device.type != "cpu" or weight.shape[-1] == 1:
        return False
    is_small = x.shape[0] * x.shape[2] * x.shape[3] < _PIXELS
    rounds = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and max(weight.shape[:2]) > _CHANNELS
    return (is_small or rounds) and not _suits_winograd(x, weight, padding)


def _suits_winograd(x: Tensor, weight: Tensor, padding: Sequence[int]) -> bool:
    """True if `ops.conv3x3` is the faster convolution."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    on_cpu = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and x.dim() == 4
    enough = on_cpu and weight.shape[-1] == 3 and x.shape[0] * x.shape[2] * x.shape[3] >= _PIXELS
    return enough and _Panels.fits(weight, padding, x.shape)


def is_packable(weight: Tensor) -> bool:
    """True if packing the weight makes convolutions faster."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


class PackedConv2d:
    """A convolution with stride 1 and a constant weight. The first call with an input on a CPU packs the weight.

    Args:
        weight: (out, in, k, k).
        bias: (out,) or None.
        padding: (rows, columns) of zeros on each side.
        relu: True applies a ReLU to the result.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: Sequence[int], relu: bool = False):
        self._packable = is_packable(weight)
        self._weight: Tensor | _Panels | _OneDNN = weight
        if not self._packable:
            # cuDNN needs a channels-last weight for a channels-last input, and would convert any other in every call.
            self._weight = weight.contiguous(memory_format=torch.channels_last)
        self._bias, self._padding, self._relu = bias, list(padding), relu

    @property
    def is_traceable(self) -> bool:
        """True if compiled code can call the object: calls do not change it."""
        return not self._packable

    def __call__(self, x: Tensor | DeferredModulation, add: Tensor | None = None) -> Tensor:
        """The convolution of x, plus `add`."""
        packs = self._packs(x.x if isinstance(x, DeferredModulation) else x)
        if isinstance(self._weight, Tensor) and packs:
            for way in (_Panels, _OneDNN):
                if way.fits(self._weight, self._padding, x.shape):
                    self._weight = way(self._weight, self._bias, self._padding, self._relu, x.shape)
                    break
        if isinstance(self._weight, _Panels) and packs:
            return self._weight(x, add)
        x = x.tensor() if isinstance(x, DeferredModulation) else x
        if isinstance(self._weight, _OneDNN) and packs:
            return self._weight(x, add)
        return self._unpacked(x, add)

    def _packs(self, x: Tensor) -> bool:
        like_weight = x.dtype == torch.float32 and x.device.type == "cpu" and x.dim() == 4
        return self._packable and like_weight and not torch.is_autocast_enabled("cpu")

    def _unpacked(self, x: Tensor, add: Tensor | None) -> Tensor:
        weight = self._weight if isinstance(self._weight, Tensor) else self._weight.dense()
        y = F.conv2d(x, weight.to(x.dtype), None if self._bias is None else self._bias.to(x.dtype), 1, self._padding)
        y = y if add is None else y + add
        return y.relu() if self._relu else y


class _Panels:
    """A weight packed for `ops.conv`, used where that is compiled and the input has enough channels and pixels."""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: Sequence[int], relu: bool, shape: Sequence[int]):
        self._panels, self._relu = ops.pack_conv_weight(weight), relu
        self._bias = weight.new_zeros(len(weight)) if bias is None else bias

    @staticmethod
    def fits(weight: Tensor, padding: Sequence[int], shape: Sequence[int]) -> bool:
        out, channels, *kernel = weight.shape
        known = [*kernel, *padding] in ([3, 3, 1, 1], [1, 1, 0, 0]) and backends.is_compiled_on_cpu()
        return known and out >= 32 and channels >= 16 and shape[2] * shape[3] >= 128

    def __call__(self, x: Tensor | DeferredModulation, add: Tensor | None) -> Tensor:
        if isinstance(x, Tensor):
            return ops.conv(x, self._panels, self._bias, add, self._relu)
        modulation = (x.stats.mean, x.stats.rstd, x.table.rows, x.table.pixel_row, x.negative_slope, x.upsample)
        return ops.modulate_conv(x.x, *modulation, self._panels, self._bias, add)

    def dense(self) -> Tensor:
        """The weight (out, in, k, k), recovered up to rounding."""
        points = self._panels.transpose(1, 2).flatten(2)[..., : len(self._bias)]
        if len(points) == 1:
            return points.permute(2, 1, 0).unsqueeze(-1)
        invert = points.new_tensor([[1, 0, 0, 0], [0, 1, -1, 0], [0, 0, 0, 1]])
        return torch.einsum("ki, ijco, lj -> ockl", invert, points.unflatten(0, (4, 4)), invert)


class _OneDNN:
    """A weight in oneDNN's own layout, chosen for one input shape; inputs of other shapes work, too."""

    def __init__(self, weight: Tensor, bias: Tensor | None, padding: Sequence[int], relu: bool, shape: Sequence[int]):
        reorder: Any = torch._C._nn.mkldnn_reorder_conv2d_weight
        self._weight = reorder(weight.to_mkldnn(), padding, [1, 1], [1, 1], 1, list(shape))
        self._bias, self._relu = bias, relu
        self._settings = (padding, [1, 1], [1, 1], 1)

    @staticmethod
    def fits(weight: Tensor, padding: Sequence[int], shape: Sequence[int]) -> bool:
        # torch.compile uses this operator for frozen convolutions.
        return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_convolution_pointwise")

    def __call__(self, x: Tensor, add: Tensor | None) -> Tensor:
        then = "relu" if self._relu else None
        convolve = torch.ops.mkldnn._convolution_pointwise
        # The memory format of an image with one pixel or one channel is ambiguous, and torch 2.11 cannot fuse its
        # addition.
        if add is not None and x.shape[2] * x.shape[3] > 1 and add.shape[1] > 1:
            return convolve.binary(x, add, self._weight, self._bias, *self._settings, "add", 1.0, then, [], None)
        if add is not None:
            y = convolve(x, self._weight, self._bias, *self._settings, "none", [], "") + add
            return y.relu() if self._relu else y
        return convolve(x, self._weight, self._bias, *self._settings, then or "none", [], "")

    def dense(self) -> Tensor:
        return self._weight.to_dense()


def _with_inv_sigma(weight: Tensor, u: Tensor, v: Tensor, inv_sigma: Tensor) -> tuple[Tensor, Tensor]:
    if not transforms.are_active():
        return _WithInvSigma.apply(weight, u, v, inv_sigma)
    with torch.autocast(weight.device.type, enabled=False):
        return weight, torch.dot(u, torch.mv(weight.flatten(1), v)).reciprocal()


class _WithInvSigma(torch.autograd.Function):
    """Returns the weight (out, in, k, k) and 1 / sigma with their derivatives, where sigma = u . (W v).

    The weight is passed through so that both of its gradients arrive here: d sigma / dW = u v^T is added in one pass.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, u: Tensor, v: Tensor, inv_sigma: Tensor) -> tuple[Tensor, Tensor]:
        inv_sigma = inv_sigma.clone()
        # The output is saved, not the argument: second derivatives need its dependence on the weight.
        ctx.save_for_backward(u, v, inv_sigma)
        return weight.view_as(weight), inv_sigma

    @staticmethod
    def backward(ctx, d_weight: Tensor, d_inv_sigma: Tensor):
        u, v, inv_sigma = ctx.saved_tensors
        matrix = torch.addr(d_weight.flatten(1), u * (-d_inv_sigma * inv_sigma.square()), v)
        return matrix.view(d_weight.shape), None, None, None
