"""The networks, with the module and parameter names of the original implementation."""

from spade_model.networks.build import build_discriminator, build_encoder, build_generator
from spade_model.networks.discriminator import MultiscaleDiscriminator
from spade_model.networks.encoder import ConvEncoder
from spade_model.networks.generator import SPADEGenerator
from spade_model.networks.initialization import initialize
from spade_model.networks.pix2pixhd import Pix2PixHDGenerator
from spade_model.networks.vgg import VGG19Features, load_vgg19

__all__ = [
    "ConvEncoder",
    "MultiscaleDiscriminator",
    "Pix2PixHDGenerator",
    "SPADEGenerator",
    "VGG19Features",
    "build_discriminator",
    "build_encoder",
    "build_generator",
    "initialize",
    "load_vgg19",
]
