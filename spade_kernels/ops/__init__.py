"""The operators, `torch.ops.spade_kernels.*`, one file each; importing the package registers them.

An operator's file contains its Python function, schema, argument checks, fake kernel and derivatives, and lists the
backends that have kernels for it. `reference.py` documents arguments and results and has the kernel for every device;
the other kernels are in triton/, csrc/cpu/ and csrc/cuda/, in files with the same stem. Direct calls of
`torch.ops.spade_kernels.*` support neither forward mode nor torch.func; the functions here do.
"""

from spade_kernels.ops._arguments import require_storage
from spade_kernels.ops.channel_stats import channel_stats
from spade_kernels.ops.conv import conv, conv3x3, modulate_conv, pack_conv_weight
from spade_kernels.ops.gather_sum import gather_sum
from spade_kernels.ops.modulate import modulate
from spade_kernels.ops.modulation_table import modulation_table, pack_modulation_weight
from spade_kernels.ops.segments import (
    segments_at_once,
    segments_by_tap,
    segments_by_value,
    segments_of_each,
    tap_keys,
)
from spade_kernels.ops.window_index import why_no_windows, window_index

__all__ = [
    "channel_stats",
    "conv",
    "conv3x3",
    "gather_sum",
    "modulate",
    "modulate_conv",
    "modulation_table",
    "pack_conv_weight",
    "pack_modulation_weight",
    "require_storage",
    "segments_at_once",
    "segments_by_tap",
    "segments_by_value",
    "segments_of_each",
    "tap_keys",
    "why_no_windows",
    "window_index",
]
