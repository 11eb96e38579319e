# Everything runs in a virtual environment of its own, .venv, created on first use.
PYTHON ?= python3
# The torch to install when there is none; for another CUDA version see pytorch.org.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test check format bench asan clean

help:
	@echo "make demo     train on toy landscapes (CPU, under 5 minutes) and print the page to look at"
	@echo "make test     run the tests"
	@echo "make check    lint, formatting and type checks"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make bench    time the generator (DATAROOT=folder in the coco layout for real masks)"
	@echo "make asan     run the operator tests on kernels built with AddressSanitizer and UBSan"
	@echo "make install  create $(VENV) with the package and everything the above needs"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" wheel ninja pybind11 numpy
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/toy_demo.py --out demo

test: install
	$(BIN)/python -m pytest -n 2

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/cpu/*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/cpu/*

bench: install
	$(BIN)/python benchmarks/generator.py --dataroot "$(DATAROOT)"

SANITIZE := -fsanitize=address,undefined
asan: install
	CFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -DSPADE_ONE_TARGET" \
	LDFLAGS="$(SANITIZE)" SPADE_KERNELS_BUILD=cpu $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=build/asan/lib $(BIN)/python -m pytest -q -k "cpu and not compile and not export" \
	tests/test_ops.py tests/test_window_index.py tests/test_label_map.py tests/test_layers.py

clean:
	rm -rf $(VENV) demo build dist *.egg-info
