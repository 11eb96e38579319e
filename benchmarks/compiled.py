"""Compiles every GPU kernel, without a GPU, and counts registers, spills and important instructions in the result.

    python benchmarks/compiled.py [--only triton] [--out benchmarks/results/compiled.json]

Triton kernels are compiled in the variants of `triton_variants.py`. CUDA kernels are compiled in the variants that the
sources instantiate; this needs nvcc and cuobjdump (which Triton includes). If Triton or nvcc is missing, the result
file says so.
"""

from __future__ import annotations

import argparse
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import tempfile
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

TARGETS = (80, 90, 100)

_ROOT = Path(__file__).resolve().parents[1]
_NVCC_FLAGS = ("-std=c++20", "--expt-relaxed-constexpr", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020b000000000000")
_USAGE = {"registers": "REG", "stack": "STACK", "shared": "SHARED"}
# These match SASS, for CUDA kernels, and PTX, for Triton kernels: disassembling one takes longer than compiling it.
_INSTRUCTIONS = {
    "wide_loads": re.compile(
        r"\b(LDG|LDGSTS)\.\S*\b(128|256)\b|\bld\.global\S*\.(v4\.b32|v2\.b64|v8\.b32)|\bcp\.async\.cg\b"
    ),
    "tensor_core": re.compile(r"\b(HMMA|HGMMA|UTCHMMA|mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b"),
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel.

    Attributes:
        source: path of its source file, relative to the repository.
        variant: its dtypes and compile-time arguments.
        target: the architecture, such as "sm_90".
        registers: number per thread.
        stack: bytes per thread of stack, to which registers are spilled.
        shared: bytes per block of shared memory.
        wide_loads: number of instructions that load at least 16 bytes from global memory.
        tensor_core: number of matrix multiplication instructions.
    """

    source: str
    name: str
    variant: str
    target: str
    registers: int
    stack: int
    shared: int
    wide_loads: int
    tensor_core: int


def why_not_triton() -> str | None:
    """Returns the reason why Triton kernels cannot be compiled here, or None if they can."""
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


def why_not_cuda() -> str | None:
    """Returns the reason why CUDA sources cannot be compiled and disassembled here, or None if they can."""
    if shutil.which("nvcc") is None:
        return "nvcc is not on the PATH"
    return None if _cuobjdump() else "cuobjdump is not on the PATH, and Triton, which includes it, is not installed"


def triton_kernels() -> list[Kernel]:
    """Compiles every variant of every Triton kernel for every target."""
    jobs = [(index, target) for index in range(len(_variants())) for target in TARGETS]
    with ProcessPoolExecutor() as pool:
        return list(pool.map(_triton_kernel, jobs, chunksize=8))


def cuda_kernels() -> list[Kernel]:
    """Compiles every CUDA kernel for every target."""
    sources = sorted((_ROOT / "csrc" / "cuda").glob("*.cu"))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [kernel for kernels in pool.map(_cuda_source, sources) for kernel in kernels]


def environment() -> dict[str, str | None]:
    """Returns the versions of the compilers, torch and Python, and the date."""
    nvcc = re.search(r"release \S+ (\S+)", _run("nvcc", "--version")) if shutil.which("nvcc") else None
    return {
        "triton": None if why_not_triton() else importlib.metadata.version("triton"),
        "nvcc": nvcc and nvcc.group(1),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": datetime.date.today().isoformat(),
    }


@functools.cache
def _variants() -> list:
    from triton_variants import layer_variants

    return layer_variants()


def _triton_kernel(job: tuple[int, int]) -> Kernel:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    index, target = job
    variant = _variants()[index]
    names = variant.kernel.arg_names
    source = ASTSource(
        fn=variant.kernel,
        signature={name: variant.signature.get(name, "constexpr") for name in names},
        constexprs=variant.constexprs,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in variant.divisible},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        (usage,) = _usage(binary).values()
    pointers = dict.fromkeys(kind[1:] for kind in variant.signature.values() if kind.startswith("*"))
    constants = (f"{name}={value}" for name, value in variant.constexprs.items())
    multiples = (f"16 | {name}" for name in variant.divisible if not variant.signature[name].startswith("*"))
    return Kernel(
        source=f"{variant.kernel.fn.__module__.replace('.', '/')}.py",
        name=variant.kernel.__name__,
        variant=", ".join((" ".join(pointers), *constants, *multiples, f"warps={variant.num_warps}")),
        target=f"sm_{target}",
        **usage | {"shared": compiled.metadata.shared},
        **_count_instructions(compiled.asm["ptx"].splitlines()),
    )


def _cuda_source(source: Path) -> list[Kernel]:
    includes = [f"-I{Path(torch.__file__).parent / 'include'}"]
    targets = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in TARGETS]
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / f"{source.stem}.o"
        _run("nvcc", "-c", str(source), "-o", str(binary), *_NVCC_FLAGS, *includes, *targets)
        usage, code = _usage(binary), _machine_code(binary)
    names = _run("c++filt", "--no-params", *(symbol for _, symbol in usage)).splitlines()
    kernels = []
    for (key, figures), name in zip(usage.items(), names, strict=True):
        path, target = str(source.relative_to(_ROOT)), key[0]
        kernels.append(Kernel(path, *_name_and_variant(name), target, **figures, **_count_instructions(code[key])))
    return kernels


def _name_and_variant(symbol: str) -> tuple[str, str]:
    """Splits spade::cuda::run<spade::cuda::Kernel<float, 4> > into Kernel and its template arguments."""
    symbol = re.sub(r"(\(anonymous namespace\)|\b\w+)::", "", symbol)
    symbol = re.sub(r"^run<(.*\S) ?>$", r"\1", symbol)
    name, _, arguments = symbol.partition("<")
    return name, arguments.removesuffix(">").strip()


def _usage(binary: Path) -> dict[tuple[str, str], dict[str, int]]:
    """Returns the registers, stack and shared memory of each (target, symbol) of an object file."""
    found, target, symbol = {}, "", ""
    for line in _run(_cuobjdump(), "--dump-resource-usage", str(binary)).splitlines():
        if "arch = " in line:
            target = line.split()[-1]
        elif "Function " in line:
            symbol = line.split()[-1].rstrip(":")
        elif "REG:" in line:
            usage = dict(part.split(":") for part in line.split())
            found[target, symbol] = {name: int(usage[key]) for name, key in _USAGE.items()}
    return found


def _machine_code(binary: Path) -> dict[tuple[str, str], list[str]]:
    """Returns the instructions of each (target, symbol) of an object file."""
    found, target, symbol = defaultdict(list), "", ""
    for line in _run(_cuobjdump(), "--dump-sass", str(binary)).splitlines():
        if "arch = " in line:
            target = line.split()[-1]
        elif "Function : " in line:
            symbol = line.split()[-1]
        else:
            found[target, symbol].append(line)
    return found


def _count_instructions(lines: list[str]) -> dict[str, int]:
    return {name: sum(pattern.search(line) is not None for line in lines) for name, pattern in _INSTRUCTIONS.items()}


def _cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" if triton and triton.origin else None
    return shutil.which("cuobjdump") or (shutil.which("cuobjdump", path=bundled) if bundled else None)


def _run(*command: str | None) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["triton", "cuda"])
    parser.add_argument("--out", type=Path, default=_ROOT / "benchmarks" / "results" / "compiled.json")
    arguments = parser.parse_args()
    kernels, not_run = [], {}
    everything = {"triton": (why_not_triton, triton_kernels), "cuda": (why_not_cuda, cuda_kernels)}
    for what in [arguments.only] if arguments.only else everything:
        probe, compile_all = everything[what]
        if reason := probe():
            not_run[what] = reason
        else:
            kernels += compile_all()
    lines = ",\n".join(json.dumps(asdict(kernel)) for kernel in kernels)
    head = f'"environment": {json.dumps(environment())},\n"not run": {json.dumps(not_run)}'
    arguments.out.write_text(f'{{{head},\n"kernels": [\n{lines}\n]}}\n')
    print(
        f"{len(kernels)} kernels in {arguments.out}",
        *(f"{what} not run: {why}" for what, why in not_run.items()),
        sep="\n",
    )


if __name__ == "__main__":
    main()
