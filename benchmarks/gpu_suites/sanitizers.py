"""NVIDIA's compute-sanitizer runs its four tools over `gpu_sanitize.py`; each must have run and found nothing."""

from __future__ import annotations

import re
import shutil
from functools import partial

from spade_model.benchmark.steps import FAILED, PASSED, Job, python

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
BACKENDS = ("cuda", "triton")
END = "gpu_sanitize: reached the end after"

_SUMMARIES = {"racecheck": r"RACECHECK SUMMARY: (\d+) hazards? displayed"}
_SUMMARY = r"ERROR SUMMARY: (\d+) errors?"


def program() -> str:
    """Returns compute-sanitizer's path, or its name where it is not to be found."""
    name = "compute-sanitizer"
    return shutil.which(name) or shutil.which(name, path="/usr/local/cuda/bin") or name


def job(tool: str, limit: float) -> Job:
    """Returns the job of `gpu_sanitize.py` under one tool.

    Every tensor has an allocation of its own, or writes past its end would be found only past the end of torch's pool.
    """
    # Some of the driver calls that torch makes at its start may fail.
    options = ["--report-api-errors", "no"] if tool == "memcheck" else []
    # With env, as it may not be there.
    command = ["env", program(), "--tool", tool, *options, *python("-m", "benchmarks.gpu_sanitize")]
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Job(f"sanitizer {tool}", command, limit, environment, partial(judge, tool))


def judge(tool: str, status: int, output: str) -> tuple[str, str]:
    """Returns PASSED only where the tool's summary says that it found nothing, and the script called every backend."""
    found = re.findall(_SUMMARIES.get(tool, _SUMMARY), output)
    ended = re.search(rf"^{END} (.*)", output, re.MULTILINE)
    if not found:
        return FAILED, f"{tool} printed no summary: it did not run (exit status {status})"
    if count := sum(map(int, found)):
        return FAILED, f"{tool}: {count} findings, in {', '.join(_kernels(output)) or 'no named kernel'}"
    if "Internal Sanitizer Error" in output:
        return FAILED, f"{tool} itself failed"
    if ended is None:
        return FAILED, f"the script did not reach its end under {tool} (exit status {status})"
    if status != 0:
        return FAILED, f"exit status {status} under {tool}"
    if missing := [name for name in BACKENDS if not re.search(rf"\b{name} [1-9]", ended.group(1))]:
        return FAILED, f"no call of {' and '.join(missing)} under {tool}"
    return PASSED, f"{tool} ran over calls of {ended.group(1)} and found nothing"


def _kernels(output: str) -> list[str]:
    """Returns the names of the kernels that the findings are in, each once."""
    return list(dict.fromkeys(re.findall(r"\bat (.{1,80}?)\+0x", output)))[:5]
