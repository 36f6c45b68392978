# make sample | test | bench | lint, and test-all, gpu-check, format, clean. The first that runs makes the
# environment and installs into it; again only after pyproject.toml or the constraints change.
#   make test ARGS="-k noise"                 arguments for the tool behind the target
#   make test PYTHON=python3.12 VENV=.venv312  another interpreter, another place
#   make test CONSTRAINTS=                    the newest releases instead of CI's

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= .ci/constraints.txt
ARGS ?=

BIN := $(VENV)/bin
PIP_INSTALL = $(BIN)/python -m pip install --quiet $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
INSTALLED := $(VENV)/.fastdiff-installed
CPP_SOURCES = $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')
MAKEFLAGS += --no-print-directory

.PHONY: sample test test-all bench gpu-check lint lint-ruff lint-mypy lint-clang-format lint-traps format clean

sample: $(INSTALLED)
	$(BIN)/fastdiff sample $(ARGS)

test: $(INSTALLED)
	$(BIN)/pytest $(ARGS)

test-all: $(INSTALLED)
	$(BIN)/pytest -m "slow or not slow" $(ARGS)

bench: $(INSTALLED)
	$(BIN)/pytest benchmarks/ $(ARGS)

# On a machine with a GPU: its own python, nothing installed, from a bare checkout.
gpu-check:
	@$(PYTHON) -c "import torch, triton" 2>/dev/null || \
	  { echo "$(PYTHON) has no torch and triton: make gpu-check PYTHON=... names one that has"; exit 2; }
	$(PYTHON) -m fastdiff selftest --gpu $(ARGS)

lint: lint-ruff lint-mypy lint-clang-format lint-traps

lint-ruff: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

lint-mypy: $(INSTALLED)
	$(BIN)/mypy

lint-clang-format: $(INSTALLED)
	$(if $(CPP_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES))

lint-traps: $(INSTALLED)
	$(BIN)/python .ci/traps.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CPP_SOURCES),$(BIN)/clang-format -i $(CPP_SOURCES))

# torch goes first and alone, so that what it asks for settles before anything else is resolved.
$(INSTALLED): pyproject.toml $(CONSTRAINTS)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP_INSTALL) torch setuptools
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	$(PIP_INSTALL) --no-deps k-diffusion denoising-diffusion-pytorch
	touch $@

clean:
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find fastdiff kernels csrc tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
