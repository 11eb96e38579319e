"""Builds the package; metadata is in pyproject.toml.

SPADE_KERNELS_BUILD chooses what is compiled: `cpu`, `none`, or `auto` (the default): cpu where there is a C++ compiler.
Needs --no-build-isolation, so that the torch that is installed is the torch that is built against.
"""

import os
import platform
import shutil
import sys

from setuptools import setup

SOURCES = [
    "module.cpp",
    "cpu/ops.cpp",
    "cpu/window_index.cpp",
    "cpu/gemm.cpp",
    "cpu/rows.cpp",
    "cpu/modulation_table.cpp",
    "cpu/channel_stats.cpp",
    "cpu/modulate.cpp",
]
TORCH_TARGET = "0x020b000000000000"


def compiled():
    """(ext_modules, cmdclass) for what SPADE_KERNELS_BUILD asks for."""
    choice = os.environ.get("SPADE_KERNELS_BUILD", "auto")
    if choice not in ("auto", "cpu", "none"):
        sys.exit(f"SPADE_KERNELS_BUILD={choice!r} is not one of auto, cpu, none")
    has_compiler = any(shutil.which(name) for name in (os.environ.get("CXX", "c++"), "g++", "clang++"))
    if choice == "none" or (choice == "auto" and not (has_compiler and sys.platform == "linux")):
        return [], {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        if choice == "auto":
            return [], {}
        sys.exit("SPADE_KERNELS_BUILD=cpu needs torch: install it first and build with pip's --no-build-isolation")
    flags = ["-std=c++20", "-O3", "-fno-math-errno"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    extension = CppExtension(
        "spade_kernels._C",
        [os.path.join("csrc", source) for source in SOURCES],
        extra_compile_args=[*flags, f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", '-DTORCH_TARGET_VERSION_TEXT="2.11"'],
        optional=choice == "auto",
    )
    return [extension], {"build_ext": BuildExtension}


extensions, commands = compiled()
setup(ext_modules=extensions, cmdclass=commands)
