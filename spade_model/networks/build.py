"""Builds the networks from the configs."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TypeVar

from torch import nn

from spade_model.config import DataConfig, ModelConfig, check_choices
from spade_model.networks.discriminator import MultiscaleDiscriminator
from spade_model.networks.encoder import ConvEncoder
from spade_model.registry import GENERATORS

_Network = TypeVar("_Network", bound=nn.Module)


def build_generator(data: DataConfig, model: ModelConfig) -> nn.Module:
    """Builds the generator that model.netG names. Raises UserError for an unknown name."""
    check_choices(model)
    return _build(GENERATORS[model.netG].network, data, model)


def build_discriminator(data: DataConfig, model: ModelConfig) -> MultiscaleDiscriminator:
    return _build(MultiscaleDiscriminator, data, model)


def build_encoder(data: DataConfig, model: ModelConfig) -> ConvEncoder | None:
    """Builds the style encoder; returns None without use_vae."""
    return _build(ConvEncoder, data, model) if model.use_vae else None


def _build(network: Callable[..., _Network], data: DataConfig, model: ModelConfig) -> _Network:
    """Builds a network from a class whose constructor parameters are named like options, and get their values."""
    names = inspect.signature(network).parameters
    return network(**{name: getattr(part, name) for part in (data, model) for name in names if hasattr(part, name)})
