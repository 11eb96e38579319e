"""The choice of kernels, what `build_info` says, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import spade_kernels
from spade_kernels import backends, build_info, use_backend


@pytest.fixture(autouse=True)
def _restored_choice():
    yield
    use_backend("auto")


def test_build_info():
    info = build_info()
    assert set(info) == {
        *(
            "spade_kernels",
            "python",
            "torch",
            "numpy",
            "platform",
            "threads",
            "cpu",
            "gpus",
            "backend",
            "backends",
            "kernels",
            "compiled",
        )
    }
    assert info["spade_kernels"] == spade_kernels.__version__
    assert list(info["backends"]) == ["cuda", "triton", "cpu", "reference"]
    assert info["backends"]["reference"] is None
    assert all(reason is None or len(reason) > 10 for reason in info["backends"].values())


@pytest.mark.parametrize("name", ["cuda", "triton", "cpu", "reference"])
def test_explicit_choice_is_kept_or_raises_its_reason(monkeypatch, name):
    for reason in (None, "the fan is too loud"):
        monkeypatch.setitem(backends._PROBES, name, lambda reason=reason: reason)
        if reason is None:
            use_backend(name)
            assert build_info()["backend"] == name
        else:
            use_backend("auto")
            with pytest.raises(RuntimeError, match=f"backend '{name}' cannot run: {reason}"):
                use_backend(name)
            assert backends._chosen == "auto"


def test_auto_takes_the_first_that_can_run(monkeypatch):
    use_backend("reference")
    use_backend("auto")
    for name in ("cpu", "triton", "cuda"):
        monkeypatch.setitem(backends._PROBES, name, lambda: None)
        assert backends.current_backend() == name


@pytest.fixture
def _gpu_kernels(monkeypatch):
    """Makes all GPU backends look installed; nothing is registered."""
    monkeypatch.setattr(backends, "_override", lambda *names: None)
    monkeypatch.setattr(backends, "_cuda", backends)
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._PROBES, name, lambda: None)


@pytest.mark.usefixtures("_gpu_kernels")
def test_kernels_of_cuda_tensors():
    with_triton, with_cuda = backends.operators_of("triton"), backends.operators_of("cuda")
    auto = dict.fromkeys(backends.kernels_on("cuda"), "reference") | dict.fromkeys(with_triton, "triton")
    auto |= dict.fromkeys(with_cuda, "cuda")
    assert backends.kernels_on("cuda") == auto
    use_backend("triton")
    assert backends.kernels_on("cuda") == auto | dict.fromkeys(with_triton, "triton")
    use_backend("cuda")
    assert backends.kernels_on("cuda") == auto
    use_backend("reference")
    assert set(backends.kernels_on("cuda").values()) == {"reference"}


@pytest.mark.usefixtures("_gpu_kernels")
def test_what_is_missing_falls_to_the_next(monkeypatch):
    monkeypatch.setattr(backends, "_cuda", None)
    with_triton = backends.operators_of("triton")
    for name, kernel in backends.kernels_on("cuda").items():
        assert kernel == ("triton" if name in with_triton else "reference")
    monkeypatch.setattr(backends, "_why_no_triton", lambda: "it is not here")
    assert set(backends.kernels_on("cuda").values()) == {"reference"}


def test_compiled_kernels_are_those_that_the_operators_files_name():
    if backends.can_run_cpu() is not None:
        pytest.skip("there are no compiled kernels")
    registered = {
        name
        for name in backends.kernels_on("cpu")
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"spade_kernels::{name}", "CPU")
    }
    assert registered == set(backends.operators_of("cpu"))


def test_compiled_kernels_of_other_sources_are_not_used(monkeypatch):
    """A checkout whose C++ sources changed after its build: their operators may take other arguments."""
    if backends.can_run_cpu() is not None:
        pytest.skip("there are no compiled kernels")
    monkeypatch.setattr(backends, "fingerprint", lambda folder: "another")
    module, reason = backends._load("_C", "cpu")
    assert module is None
    assert "was built from other sources than those of this checkout" in reason
    assert "SPADE_KERNELS_BUILD=cpu pip install" in reason


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"unknown backend 'gpu'; choose one of auto, cuda, triton, cpu, reference"):
        use_backend("gpu")


def test_every_public_name_exists():
    assert all(hasattr(spade_kernels, name) for name in spade_kernels.__all__)


def test_import_brings_in_nothing_optional():
    """In a fresh process: no Triton, no compiler, no image or model code, and no CUDA context."""
    code = """
import sys, torch
before = set(sys.modules)
import spade_kernels
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
print(torch.cuda.is_initialized(), *sorted(name for name in ("torch._dynamo", "triton") if name in sys.modules))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    new, state = run.stdout.splitlines()
    assert not {"triton", "matplotlib", "PIL", "spade_model"} & set(new.split())
    assert state == "False"


def test_the_short_question_has_the_long_ones_answer():
    for name in ("reference", "auto", *(["cpu"] if backends.can_run_cpu() is None else [])):
        use_backend(name)
        assert backends.is_compiled_on_cpu() == (backends.kernels_on("cpu")["conv"] == "cpu")
