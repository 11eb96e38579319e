# Everything runs in a virtual environment of its own, .venv, created on first use.
PYTHON ?= python3
# The torch to install when there is none; for another CUDA version see pytorch.org.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test check format clean

help:
	@echo "make demo     train on toy landscapes (CPU, under 5 minutes) and print the page to look at"
	@echo "make test     run the tests"
	@echo "make check    lint, formatting and type checks"
	@echo "make format   rewrite the sources in the project's format"
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

clean:
	rm -rf $(VENV) demo build dist *.egg-info
