"""Networks whose modules were wrapped, hooked, parametrized or replaced: what stock modules in their place compute."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import spade_kernels as sk
from spade_kernels.convolution import Conv2d
from spade_kernels.testing import random_label_map, relative_error
from spade_model.networks import ConvEncoder, MultiscaleDiscriminator, Pix2PixHDGenerator, SPADEGenerator
from spade_model.networks.generator import SPADEResnetBlock

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*spectral_norm.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning"),
]

FIN, FOUT, CLASSES = 4, 6, 3
DOUBLE = torch.float64


class LowRank(nn.Module):
    """A convolution with a trained correction beside it, as adapters are."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False)
        self.to(base.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(x))


class Quantized(nn.Module):
    """A convolution of 8-bit weights: it has no parameters, and no floating-point ones."""

    def __init__(self, base: nn.Conv2d):
        super().__init__()
        weight = base.weight.detach()
        self.scale, self.padding = weight.abs().max().item() / 127, base.padding
        self.register_buffer("weight", (weight / self.scale).round().to(torch.int8))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight.to(x.dtype) * self.scale, padding=self.padding)


class Halved(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight / 2


def replaced(block: nn.Module, name: str) -> None:
    old = block.get_submodule(name)
    setattr(block, name, nn.Conv2d(old.in_channels, old.out_channels, 3, padding=1, bias=False).to(DOUBLE))


def low_rank(block: nn.Module, name: str) -> None:
    setattr(block, name, LowRank(block.get_submodule(name)))


def quantized(block: nn.Module, name: str) -> None:
    setattr(block, name, Quantized(block.get_submodule(name)))


def hooked(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_forward_hook(lambda module, args, result: result + args[0].mean())


def hooked_before(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0].sin(),))


def hooked_in_the_backward(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_full_backward_hook(lambda module, grads, _: (grads[0] * 3,))


def with_a_forward_of_its_own(block: nn.Module, name: str) -> None:
    module = block.get_submodule(name)
    plain = module.forward
    module.forward = lambda x: plain(x.cos())


def circular(block: nn.Module, name: str) -> None:
    block.get_submodule(name).padding_mode = "circular"


def parametrized(block: nn.Module, name: str) -> None:
    parametrize.register_parametrization(block.get_submodule(name), "weight", Halved())


def with_new_spectral_norm(block: nn.Module, name: str) -> None:
    parametrizations.spectral_norm(block.get_submodule(name))


def with_new_weight_norm(block: nn.Module, name: str) -> None:
    parametrizations.weight_norm(block.get_submodule(name))


def with_old_spectral_norm(block: nn.Module, name: str) -> None:
    spectral_norm(block.get_submodule(name))


def with_old_weight_norm(block: nn.Module, name: str) -> None:
    weight_norm(block.get_submodule(name))


def pruned(block: nn.Module, name: str) -> None:
    module = block.get_submodule(name)
    prune.l1_unstructured(module, "weight", amount=0.5)
    with torch.no_grad():
        module.weight_orig.mul_(2)


ANY = [
    replaced,
    low_rank,
    quantized,
    hooked,
    hooked_before,
    hooked_in_the_backward,
    with_a_forward_of_its_own,
    circular,
]
OF_THE_WEIGHT = [
    *(parametrized, pruned, with_new_spectral_norm, with_new_weight_norm, with_old_spectral_norm, with_old_weight_norm)
]
CASES = [(change, norm) for norm in ("spadebatch3x3", "spectralspadebatch3x3") for change in ANY]
CASES += [(change, "spadebatch3x3") for change in OF_THE_WEIGHT]


def with_stock_convolutions(block: SPADEResnetBlock) -> SPADEResnetBlock:
    twin = copy.deepcopy(block)
    for name, conv in block.named_children():
        if isinstance(conv, Conv2d):
            stock = nn.Conv2d(conv.in_channels, conv.out_channels, conv.kernel_size, 1, conv.padding)
            stock.bias = stock.bias if conv.bias is not None else None
            dtype = next(conv.parameters()).dtype
            stock = (spectral_norm(stock) if conv.spectral else stock).to(dtype)
            stock.load_state_dict(conv.state_dict())
            # Else the old spectral norm has no `weight` of this dtype yet.
            stock.eval()(torch.zeros(1, conv.in_channels, 3, 3, dtype=dtype))
            setattr(twin, name, stock.train())
    return twin


def stock_block(block: SPADEResnetBlock, x: Tensor, planes: Tensor, upsample: int) -> Tensor:
    def normalized(norm: nn.Module, x: Tensor) -> Tensor:
        if type(norm) is not sk.SPADE or norm._forward_hooks or norm._forward_pre_hooks:
            return norm(x, planes)
        hidden = norm.mlp_shared(F.interpolate(planes, x.shape[2:]))
        return norm.param_free_norm(x) * (1 + norm.mlp_gamma(hidden)) + norm.mlp_beta(hidden)

    x = F.interpolate(x, scale_factor=upsample) if upsample > 1 else x
    shortcut = block.conv_s(normalized(block.norm_s, x))
    dx = block.conv_0(F.leaky_relu(normalized(block.norm_0, x), 0.2))
    return shortcut + block.conv_1(F.leaky_relu(normalized(block.norm_1, dx), 0.2))


def check_block(change: Callable[[nn.Module, str], None], norm: str, name: str) -> None:
    torch.manual_seed(0)
    block = SPADEResnetBlock(FIN, FOUT, norm, CLASSES).to(DOUBLE)
    twin = with_stock_convolutions(block)
    for one in (block, twin):
        torch.manual_seed(1)
        change(one, name)
    mask, x = random_label_map("blobs", (2, 8, 10), CLASSES), torch.randn(2, FIN, 4, 5, dtype=DOUBLE)
    planes = mask.one_hot(DOUBLE)
    for training, upsample in ((True, 2), (True, 1), (False, 2)):
        block.train(training)
        twin.train(training)
        results = block(x, mask, upsample), stock_block(twin, x, planes, upsample)
        assert relative_error(*results) < 1e-10
        for result in results:
            result.square().sum().backward()
        # A bias before a batch norm has the gradient zero, but for rounding.
        largest = max(parameter.grad.abs().max().item() for parameter in twin.parameters())
        expected = dict(twin.named_parameters())
        for parameter_name, parameter in block.named_parameters():
            same = torch.allclose(parameter.grad, expected[parameter_name].grad, rtol=1e-9, atol=1e-12 * largest)
            assert same, parameter_name
        with torch.no_grad():
            for parameters in zip(block.parameters(), twin.parameters(), strict=True):
                for parameter in parameters:
                    parameter.mul_(1.1)
    with torch.no_grad():
        sk.freeze(block)
        assert relative_error(block(x, mask, 2), stock_block(twin, x, planes, 2)) < 1e-10


@pytest.mark.parametrize(("change", "norm"), CASES)
def test_convolutions_of_a_block(change, norm):
    check_block(change, norm, "conv_0")


@pytest.mark.parametrize("name", ["conv_1", "conv_s"])
def test_the_other_convolutions_of_a_block(name):
    check_block(hooked, "spectralspadebatch3x3", name)


def pruned_for_good(parent: nn.Module, name: str) -> None:
    """PyTorch then assigns the weight's `.data`, which it does not count as a change."""
    pruned(parent, name)
    nn.utils.prune.remove(parent.get_submodule(name), "weight")


def overwritten(parent: nn.Module, name: str) -> None:
    parameters = list(parent.get_submodule(name).parameters())
    nn.utils.vector_to_parameters(2 * nn.utils.parameters_to_vector(parameters), parameters)


@pytest.mark.parametrize("change", [circular, parametrized, pruned, pruned_for_good, overwritten, hooked])
@torch.no_grad()
def test_changes_of_a_frozen_block(change):
    """In float32, where frozen convolutions are packed."""
    block = SPADEResnetBlock(FIN, FOUT, "spadebatch3x3", CLASSES)
    mask, x = random_label_map("blobs", (2, 8, 10), CLASSES), torch.randn(2, FIN, 8, 10)
    sk.freeze(block)
    before = block(x, mask)
    change(block, "conv_0")
    expected = stock_block(copy.deepcopy(block), x, mask.one_hot(), 1)
    assert relative_error(block(x, mask), expected) < 1e-5
    assert relative_error(before, expected) > 1e-3


class PlainSPADE(nn.Module):
    """Equation 1 with a learned constant beta; it takes the condition as a tensor."""

    def __init__(self, norm: sk.SPADE):
        super().__init__()
        self.gamma = nn.Conv2d(norm.label_nc, norm.norm_nc, 1).to(DOUBLE)
        self.beta = nn.Parameter(torch.randn(norm.norm_nc, 1, 1, dtype=DOUBLE))

    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        gamma = self.gamma(F.interpolate(segmap, x.shape[2:]))
        return F.instance_norm(x) * (1 + gamma) + self.beta


class Subclass(sk.SPADE):
    def forward(self, x: Tensor, segmap: Tensor) -> Tensor:
        return super().forward(x, segmap) + 1


def replaced_norm(block: nn.Module, name: str) -> None:
    setattr(block, name, PlainSPADE(block.get_submodule(name)))


def subclassed_norm(block: nn.Module, name: str) -> None:
    block.get_submodule(name).__class__ = Subclass


def hooked_norm(block: nn.Module, name: str) -> None:
    block.get_submodule(name).register_forward_hook(lambda module, args, result: result + 1)


def norm_of_a_changed_x(block: nn.Module, name: str) -> None:
    """Its statistics are those of the changed x, which the block has not seen."""
    block.get_submodule(name).register_forward_pre_hook(lambda module, args: (args[0] ** 2, *args[1:]))


@pytest.mark.parametrize("name", ["norm_0", "norm_1", "norm_s"])
@pytest.mark.parametrize("change", [replaced_norm, subclassed_norm, hooked_norm, norm_of_a_changed_x])
def test_norms_of_a_block(change, name):
    check_block(change, "spectralspadebatch3x3", name)


def doubled_by_a_wrapper(parent: nn.Module, name: str) -> None:
    class Doubled(nn.Module):
        def __init__(self, base: nn.Module):
            super().__init__()
            self.base = base

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.base(x)

    parent.add_module(name, Doubled(parent.get_submodule(name)))


def doubled_by_a_hook(parent: nn.Module, name: str) -> None:
    parent.get_submodule(name).register_forward_hook(lambda module, args, result: 2 * result)


def doubled_by_a_parametrization(parent: nn.Module, name: str) -> None:
    class Doubled(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    parametrize.register_parametrization(parent.get_submodule(name), "weight", Doubled())


DOUBLINGS = [doubled_by_a_wrapper, doubled_by_a_hook, doubled_by_a_parametrization]


def networks() -> dict[str, tuple[Callable[[], nn.Module], list[str]]]:
    """By name: what makes the network, and convolutions and linear layers in it."""
    mask = random_label_map("blobs", (2, 32, 32), CLASSES)
    image = torch.randn(2, 3, 32, 32, dtype=DOUBLE)
    made = {
        "generator": (SPADEGenerator(CLASSES, ngf=2, crop_size=32, norm_G="spadebatch3x3"), (mask,)),
        "discriminator": (MultiscaleDiscriminator(CLASSES, ndf=2, norm_D="none"), (mask, image)),
        "encoder": (ConvEncoder(ngf=2, norm_E="none", crop_size=128, z_dim=3), (image,)),
        "pix2pixhd": (
            Pix2PixHDGenerator(CLASSES, ngf=2, norm_G="none", resnet_n_downsample=1, resnet_n_blocks=1),
            (mask,),
        ),
    }
    return {name: (network.to(DOUBLE).eval(), arguments) for name, (network, arguments) in made.items()}


PLACES = [
    *(("generator", name) for name in ("fc", "conv_img", "up_0.conv_s", "up_3.conv_1")),
    *(("discriminator", name) for name in ("discriminator_0.model0.0", "discriminator_1.model0.0")),
    ("encoder", "layer1"),
    ("encoder", "fc_mu"),
    ("pix2pixhd", "model.1"),
]


def outputs(found: object) -> list[Tensor]:
    return [found] if isinstance(found, Tensor) else [tensor for part in found for tensor in outputs(part)]


@pytest.mark.parametrize("double", DOUBLINGS)
@pytest.mark.parametrize(("network_name", "place"), PLACES)
def test_anywhere_in_the_networks(network_name, place, double):
    torch.manual_seed(0)
    network, arguments = networks()[network_name]
    module = network.get_submodule(place)
    if module.bias is not None:
        nn.init.zeros_(module.bias)
    twin = copy.deepcopy(network)
    with torch.no_grad():
        twin.get_submodule(place).weight.mul_(2)
    weight = module.weight
    parent, _, name = place.rpartition(".")
    double(network.get_submodule(parent), name)
    found, expected = outputs(network(*arguments)), outputs(twin(*arguments))
    for one, other in zip(found, expected, strict=True):
        assert relative_error(one, other) < 1e-10
        one.square().sum().backward(retain_graph=True)
        other.square().sum().backward(retain_graph=True)
    assert relative_error(weight.grad, 2 * twin.get_submodule(place).weight.grad) < 1e-10


def test_meta_device():
    with torch.device("meta"):
        network = SPADEGenerator(CLASSES, ngf=2, crop_size=32)
        image = network(torch.empty(2, CLASSES, 32, 32))
    assert image.is_meta
    assert image.shape == (2, 3, 32, 32)
    image.sum().backward()


def test_compiled():
    torch._dynamo.reset()
    block = SPADEResnetBlock(FIN, FOUT, "spectralspadebatch3x3", CLASSES).to(DOUBLE).eval()
    low_rank(block, "conv_0")
    replaced_norm(block, "norm_1")
    mask, x = random_label_map("blobs", (2, 8, 10), CLASSES), torch.randn(2, FIN, 4, 5, dtype=DOUBLE)
    expected = block(x, mask, 2)
    assert relative_error(torch.compile(block, backend="aot_eager", fullgraph=True)(x, mask, 2), expected) < 1e-10
