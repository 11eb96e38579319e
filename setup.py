"""Builds the package; metadata is in pyproject.toml.

SPADE_KERNELS_BUILD chooses what is compiled: `cpu`, `cuda` (both), `none`, or `auto` (the default): what this machine
can compile, and an install without the rest. What is compiled against one PyTorch runs with every later one (LibTorch's
stable ABI), so a build that pip isolates takes the PyTorch of the environment that it installs into.
"""

import glob
import importlib
import os
import platform
import re
import runpy
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

import setuptools
from setuptools.command.build_py import build_py

CPU_SOURCES = ["csrc/*.cpp", "csrc/cpu/*.cpp"]
CUDA_SOURCES = ["csrc/arguments.cpp", "csrc/cuda/*.cpp", "csrc/cuda/*.cu"]
OLDEST_TORCH = (2, 11)
TORCH_TARGET = ["-DTORCH_TARGET_VERSION=0x020b000000000000", '-DTORCH_TARGET_VERSION_TEXT="2.11"']
GENERATED = Path("build", "generated")
OLDEST_SETUPTOOLS = 77  # that reads `license` in pyproject.toml
CXX20 = "#include <bit>\nstatic_assert(std::has_single_bit(2u));\n"
# Architectures to build for where there is no GPU, and the first nvcc that knows each.
ARCHITECTURES = {"8.0": (11, 0), "8.6": (11, 1), "8.9": (11, 8), "9.0": (11, 8), "10.0": (12, 8), "12.0": (12, 8)}
CHOICES = ("auto", "cpu", "none", "cuda")
# Where an install keeps the reason for being without compiled kernels; spade_kernels/backends.py reads it.
REASON = Path("spade_kernels", "not_built.txt")


def compiled():
    """(ext_modules, cmdclass) for what SPADE_KERNELS_BUILD asks for."""
    choice = os.environ.get("SPADE_KERNELS_BUILD", "auto")
    if choice not in CHOICES:
        sys.exit(f"SPADE_KERNELS_BUILD={choice!r} is not one of {', '.join(CHOICES)}")
    reason = f"SPADE_KERNELS_BUILD={choice} was set" if choice == "none" else why_no_cpu()
    if choice == "auto" and sys.platform != "linux":
        reason = "they are compiled on Linux only, unless SPADE_KERNELS_BUILD=cpu asks for them"
    if reason is not None and choice in ("cpu", "cuda"):
        sys.exit(f"SPADE_KERNELS_BUILD={choice} cannot build: {reason}")
    commands = {"build_py": python_command(reason)}
    if reason is not None:
        return [], commands
    write_fingerprint()
    extensions = [cpu_extension()]
    if choice != "cpu":
        reason = why_no_cuda()
        if reason is None:
            extensions.append(cuda_extension())
        elif choice == "cuda":
            sys.exit(f"SPADE_KERNELS_BUILD=cuda cannot build: {reason}")
    for extension in extensions:
        extension.optional = choice == "auto"
    return extensions, {**commands, "build_ext": build_command()}


def python_command(reason):
    class Python(build_py):
        def run(self):
            super().run()
            leave_reason("" if self.editable_mode else self.build_lib, reason)

    return Python


def leave_reason(folder, reason):
    """Puts the reason for being without compiled kernels, None for having them, beside the modules in the folder."""
    path = Path(folder, REASON)
    path.unlink(missing_ok=True)
    if reason is not None:
        path.write_text(reason, encoding="utf-8")


def build_command():
    from torch.utils.cpp_extension import BuildExtension

    class Build(BuildExtension):
        """One extension after another, so that an optional one that fails leaves the others."""

        def build_extensions(self):
            every = self.extensions
            for extension in every:
                self.extensions = [extension]
                # setuptools would swallow the errors of an optional one.
                is_optional, extension.optional = extension.optional, False
                try:
                    super().build_extensions()
                except Exception as error:
                    message = f"{extension.name} was not built, the compiler's messages are above: {error}"
                    if not is_optional:
                        sys.exit(message)
                    print(f"warning: {message}", file=sys.stderr)
                    if extension.name == "spade_kernels._C":
                        in_place = self.inplace or self.editable_mode
                        leave_reason("" if in_place else self.build_lib, "compiling failed when this was installed")
                finally:
                    extension.optional = is_optional
            self.extensions = every

    return Build


def why_no_cpu():
    """None, or what is missing to compile anything, and how to get it."""
    find_toolkit()
    compiler = find_compiler()
    if compiler is None:
        wanted = os.environ.get("CXX") or "C++ compiler"
        return f"there is no {wanted}; install g++ (Debian, Ubuntu: apt install g++), or name another compiler in CXX"
    probe = [*shlex.split(compiler), "-std=c++20", "-x", "c++", "-fsyntax-only", "-"]
    done = subprocess.run(probe, input=CXX20, capture_output=True, text=True)
    if done.returncode:
        return f"{compiler} does not compile C++20 ({first_line(done.stderr)}); name a newer compiler in CXX"
    headers = sysconfig.get_path("include")
    if not os.path.exists(os.path.join(headers, "Python.h")):
        return f"there is no Python.h in {headers}; install python3-dev (Debian, Ubuntu) or python3-devel (Fedora)"
    try:
        torch = import_torch()
    except (ImportError, OSError) as error:
        return (
            f"torch cannot be imported ({error}); install it first, and if it is there, build with "
            "`pip install --no-build-isolation` after `pip install 'setuptools>=77' ninja`"
        )
    if tuple(map(int, torch.__version__.split(".")[:2])) < OLDEST_TORCH:
        return f"torch {torch.__version__} is too old; pip install 'torch>={'.'.join(map(str, OLDEST_TORCH))}'"
    return None


def import_torch():
    """The torch that is installed; a build that pip isolates does not see it by itself."""
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError:
        base = {"base": sys.base_prefix, "platbase": sys.base_prefix}
        places = [sysconfig.get_path(kind, vars=of) for of in (None, base) for kind in ("purelib", "platlib")]
        for place in dict.fromkeys([*places, site.getusersitepackages()]):
            if os.path.isdir(os.path.join(place, "torch")):
                sys.path.append(place)
                break
        return importlib.import_module("torch")


def write_fingerprint():
    """Writes the header by which a compiled module knows the sources it was built from; only if they changed."""
    fingerprint = runpy.run_path("spade_kernels/_sources.py")["fingerprint"](Path())
    header, text = GENERATED / "sources.h", f'#define SPADE_SOURCES_TEXT "{fingerprint}"\n'
    if not header.is_file() or header.read_text() != text:
        GENERATED.mkdir(parents=True, exist_ok=True)
        header.write_text(text)


def find_compiler():
    """The C++ compiler's command, which torch reads from CXX too; None where there is none."""
    known = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for command in known:
        if shutil.which(shlex.split(command)[0]):
            os.environ["CXX"] = command
            return command
    return None


def first_line(text):
    return text.strip().partition("\n")[0]


def cpu_extension():
    from torch.utils.cpp_extension import CppExtension

    flags = ["-std=c++20", "-O3", "-fno-math-errno"]
    if platform.machine() in ("x86_64", "AMD64"):
        flags.append("-mprefer-vector-width=512")
    return CppExtension(
        "spade_kernels._C",
        sources(CPU_SOURCES),
        include_dirs=[str(GENERATED.absolute())],
        extra_compile_args=[*flags, *TORCH_TARGET],
    )


def cuda_extension():
    from torch.utils.cpp_extension import CUDAExtension

    version = nvcc_version()
    built_for = architectures(version)
    flags = ["-std=c++20", "-O3", "-DUSE_CUDA", *TORCH_TARGET]
    texts = [f'-DSPADE_NVCC_TEXT="{version[0]}.{version[1]}"', f'-DSPADE_ARCHITECTURES_TEXT="{built_for}"']
    nvcc = [*flags, "--expt-relaxed-constexpr", "-lineinfo"]
    return CUDAExtension(
        "spade_kernels._C_cuda",
        sources(CUDA_SOURCES),
        include_dirs=[str(GENERATED.absolute())],
        extra_compile_args={"cxx": [*flags, *texts], "nvcc": nvcc},
    )


def sources(patterns):
    return [path for pattern in patterns for path in sorted(glob.glob(pattern))]


def why_no_cuda():
    """None, or what is missing to build the CUDA kernels."""
    import torch

    if torch.version.cuda is None:
        return f"the installed torch {torch.__version__} was built without CUDA"
    version = nvcc_version()
    if version is None:
        return "there is no nvcc; install the CUDA toolkit, or set CUDA_HOME to where it is"
    if version[0] != int(torch.version.cuda.split(".")[0]):
        return f"nvcc {version[0]}.{version[1]} does not fit the CUDA {torch.version.cuda} of the installed torch"
    return None


def find_toolkit():
    """Sets CUDA_HOME where there is none but an nvcc on the PATH, which may be a wrapper far from its toolkit."""
    if os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or not shutil.which("nvcc"):
        return
    steps = subprocess.run(["nvcc", "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    if found := re.search(r"^#\$ TOP=(.+)$", steps, re.MULTILINE):
        os.environ["CUDA_HOME"] = os.path.realpath(found[1])


def nvcc_version():
    """(major, minor), or None without an nvcc that runs."""
    from torch.utils.cpp_extension import CUDA_HOME

    if CUDA_HOME is None:
        return None
    try:
        text = subprocess.run([os.path.join(CUDA_HOME, "bin", "nvcc"), "--version"], capture_output=True, text=True)
    except OSError:
        return None
    found = re.search(r"release (\d+)\.(\d+)", text.stdout)
    return None if found is None else (int(found[1]), int(found[2]))


def architectures(nvcc):
    """The architectures that the CUDA kernels are built for; sets TORCH_CUDA_ARCH_LIST where torch could not tell."""
    import torch

    if not os.environ.get("TORCH_CUDA_ARCH_LIST"):
        if torch.cuda.device_count() > 0:
            return "of the GPUs at hand"
        known = [name for name, first in ARCHITECTURES.items() if nvcc >= first]
        os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(known) + "+PTX"
    return os.environ["TORCH_CUDA_ARCH_LIST"]


if int(setuptools.__version__.partition(".")[0]) < OLDEST_SETUPTOOLS:
    sys.exit(f"setuptools {setuptools.__version__} is too old; pip install 'setuptools>={OLDEST_SETUPTOOLS}'")
extensions, commands = compiled()
setuptools.setup(ext_modules=extensions, cmdclass=commands)
