"""The choice of kernels, what `build_info` says, and what importing the package costs."""

from __future__ import annotations

import subprocess
import sys

import pytest

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
    """As on a machine where everything is installed; nothing is registered."""
    monkeypatch.setattr(backends, "_override", lambda: None)
    monkeypatch.setattr(backends, "_cuda", backends)
    monkeypatch.setattr(backends, "_why_no_triton", lambda: None)
    for name in ("cuda", "triton"):
        monkeypatch.setitem(backends._PROBES, name, lambda: None)


@pytest.mark.usefixtures("_gpu_kernels")
def test_kernels_of_cuda_tensors():
    auto = backends.kernels_on("cuda")
    first = {name: candidates[0] for name, candidates in backends._ON_CUDA.items()}
    assert auto == dict.fromkeys(backends._operators, "reference") | first
    use_backend("triton")
    assert backends.kernels_on("cuda") == auto | dict.fromkeys(
        [name for name, candidates in backends._ON_CUDA.items() if "triton" in candidates], "triton"
    )
    use_backend("cuda")
    assert backends.kernels_on("cuda") == auto
    use_backend("reference")
    assert set(backends.kernels_on("cuda").values()) == {"reference"}


@pytest.mark.usefixtures("_gpu_kernels")
def test_what_is_missing_falls_to_the_next(monkeypatch):
    monkeypatch.setattr(backends, "_cuda", None)
    for name, kernel in backends.kernels_on("cuda").items():
        assert kernel == ("triton" if "triton" in backends._ON_CUDA.get(name, ()) else "reference")
    monkeypatch.setattr(backends, "_why_no_triton", lambda: "it is not here")
    assert set(backends.kernels_on("cuda").values()) == {"reference"}


def test_every_operator_has_a_place_in_the_table():
    assert set(backends._ON_CUDA) <= set(backends._operators)


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
