"""The networks, with the module and parameter names of the original implementation."""

from spade_model.networks.build import build_discriminator, build_encoder, build_generator
from spade_model.networks.discriminator import MultiscaleDiscriminator
from spade_model.networks.encoder import ConvEncoder
from spade_model.networks.generator import SPADE_GENERATOR, SPADEGenerator
from spade_model.networks.initialization import initialize
from spade_model.networks.pix2pixhd import PIX2PIXHD, Pix2PixHDGenerator
from spade_model.networks.vgg import VGG19Features, load_vgg19
from spade_model.registry import GENERATORS, GeneratorSpec

GENERATORS["spade"] = SPADE_GENERATOR
GENERATORS["pix2pixhd"] = PIX2PIXHD

__all__ = [
    "GENERATORS",
    "ConvEncoder",
    "GeneratorSpec",
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
