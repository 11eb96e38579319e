"""spade_model: the SPADE image synthesis system on top of spade_kernels."""

from spade_model.config import DataConfig, ModelConfig, TrainConfig
from spade_model.errors import UserError
from spade_model.generate import LoadedModel, generate, load_model
from spade_model.train import train

__all__ = ["DataConfig", "LoadedModel", "ModelConfig", "TrainConfig", "UserError", "generate", "load_model", "train"]
