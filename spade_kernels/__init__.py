"""spade_kernels: exact SPADE layers, evaluated once per distinct window of the label map."""

from spade_kernels._version import __version__ as __version__
from spade_kernels.accelerate import accelerate, restore
from spade_kernels.backends import MissingKernelsWarning, build_info, use_backend
from spade_kernels.freezing import freeze
from spade_kernels.label_map import LabelMap, instance_edges
from spade_kernels.layers import SPADE
from spade_kernels.normalization import SyncBatchNorm2d
from spade_kernels.static import StaticLabelMap

__all__ = [
    "SPADE",
    "LabelMap",
    "MissingKernelsWarning",
    "StaticLabelMap",
    "SyncBatchNorm2d",
    "accelerate",
    "build_info",
    "freeze",
    "instance_edges",
    "restore",
    "use_backend",
]
