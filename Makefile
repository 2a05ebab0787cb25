# Every target sets up what it needs. By default that is a virtual environment in .venv; `PYTHON=...` names the
# interpreter to make it from, or, if that interpreter already holds torch, pytest, pybind11, cmake and ninja, the one to
# use as it is, without installing anything (nor any network). gpu-check asks python3 itself for these first.

.DEFAULT_GOAL := help
.PHONY: help venv demo test check bench gpu-check clean

PYTHON ?= python3
OUT ?= out/gpu
TOOLS := import torch, numpy, pytest, pybind11
ifeq ($(MAKECMDGOALS),gpu-check)
  NEEDED := $(TOOLS)
else ifneq ($(origin PYTHON),file)
  NEEDED := $(TOOLS), safetensors, tqdm
endif
ifdef NEEDED
  PREPARED := $(shell $(PYTHON) -c "$(NEEDED)" 2>/dev/null && command -v cmake ninja >/dev/null && echo yes)
endif

ifdef PREPARED
  RUN := $(PYTHON)
  BUILT := build/.prepared
else
  RUN := .venv/bin/python
  BUILT := .venv/.built
endif
SOURCES := $(shell find csrc -type f) CMakeLists.txt setup.py pyproject.toml

help:
	@echo "make demo       watch a vision model and a language model forget (about 3 minutes)"
	@echo "make test       run every test (10 to 13 minutes on 2 cores)"
	@echo "make check      ruff, clang-format, mypy"
	@echo "make bench      time every operator against its rivals"
	@echo "make gpu-check  on a GPU: build, tests, benchmarks, sanitizer, into OUT=folder (default: out/gpu), in 9 minutes"
	@echo "make venv       only prepare .venv; make clean removes what was built"

venv: $(BUILT)

demo: $(BUILT)
	$(RUN) -m unlearn_fast demo

test: $(BUILT)
	$(RUN) -m pytest

check: .venv/.installed
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/clang-format --dry-run -Werror $$(find csrc -type f)
	.venv/bin/mypy

bench: $(BUILT)
	$(RUN) -m unlearn_fast bench

# On a GPU it builds for that one, and a prepared interpreter needs no other build before.
gpu-check: $(if $(and $(PREPARED),$(shell nvidia-smi -L 2>/dev/null)),,$(BUILT))
	$(RUN) benchmarks/gpu_check.py $(OUT)

clean:
	rm -rf .venv build dist *.egg-info unlearn_fast/*.so unlearn_fast/_build.json

.venv/.installed: requirements-dev.txt
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet "$$(grep '^torch==' requirements-dev.txt)"
	.venv/bin/python -m pip install --quiet -r requirements-dev.txt
	touch $@

.venv/.built: .venv/.installed $(SOURCES)
	PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python -m pip install --quiet --no-build-isolation --no-deps -e .
	touch $@

build/.prepared: $(SOURCES)
	$(RUN) setup.py --quiet build_ext --inplace
	touch $@
