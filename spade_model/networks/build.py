"""Builds the networks from the configs."""

from __future__ import annotations

from torch import nn

from spade_model.config import DataConfig, ModelConfig
from spade_model.networks.discriminator import MultiscaleDiscriminator
from spade_model.networks.encoder import ConvEncoder
from spade_model.networks.generator import SPADEGenerator
from spade_model.networks.pix2pixhd import Pix2PixHDGenerator


def build_generator(data: DataConfig, model: ModelConfig) -> nn.Module:
    """Builds the SPADE or pix2pixHD generator, depending on model.netG."""
    if model.netG == "pix2pixhd":
        return Pix2PixHDGenerator(
            data.semantic_nc,
            ngf=model.ngf,
            norm_G=model.norm_G,
            resnet_n_downsample=model.resnet_n_downsample,
            resnet_n_blocks=model.resnet_n_blocks,
            resnet_kernel_size=model.resnet_kernel_size,
            resnet_initial_kernel_size=model.resnet_initial_kernel_size,
            output_nc=data.output_nc,
        )
    return SPADEGenerator(
        data.semantic_nc,
        ngf=model.ngf,
        norm_G=model.norm_G,
        num_upsampling_layers=model.num_upsampling_layers,
        crop_size=data.crop_size,
        aspect_ratio=data.aspect_ratio,
        use_vae=model.use_vae,
        z_dim=model.z_dim,
        output_nc=data.output_nc,
    )


def build_discriminator(data: DataConfig, model: ModelConfig) -> MultiscaleDiscriminator:
    return MultiscaleDiscriminator(
        data.semantic_nc,
        ndf=model.ndf,
        norm_D=model.norm_D,
        num_D=model.num_D,
        n_layers_D=model.n_layers_D,
        output_nc=data.output_nc,
    )


def build_encoder(data: DataConfig, model: ModelConfig) -> ConvEncoder | None:
    """Builds the style encoder; returns None without use_vae."""
    if not model.use_vae:
        return None
    return ConvEncoder(
        ngf=model.ngf,
        norm_E=model.norm_E,
        crop_size=data.crop_size,
        z_dim=model.z_dim,
        output_nc=data.output_nc,
    )
