# One virtual environment serves every target. `make test VENV=/some/venv` uses another one, and
# `make test PYTHON=/some/python` makes .venv with that interpreter.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PINS ?= triton==3.9.0 transformers==4.57.6 peft==0.21.2 adapters==1.3.0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
DEPS := $(VENV)/.pelt_fast_deps
BUILT := $(VENV)/.pelt_fast_built
CPP_SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.DEFAULT_GOAL := help
.PHONY: help
help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# torch first and pinned: unpinned, pip would resolve its gigabytes a second time.
$(DEPS): pyproject.toml Makefile | $(BIN)/python
	$(PIP) install "setuptools>=77" wheel "$(TORCH)"
	$(PIP) install "$(TORCH)" $(PINS) $$($(BIN)/python -c 'import tomllib; \
	  extras = tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]; \
	  print(*[f"\"{d}\"" for e in ("dev", "bench") for d in extras[e]])')
	@touch $@
