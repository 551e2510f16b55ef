# The whole developer interface. `make demo` and `make test` need Python 3.11 and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test lint lock bench faults clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(STAMP): requirements.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $(STAMP)

setup: $(STAMP)  ## Make the environment in .venv and nothing else.

lock:  ## Resolve pyproject.toml anew into requirements.lock (hashes and versions only; needs uv).
	uv pip compile pyproject.toml --all-extras --generate-hashes --universal --python-version 3.11 \
	    --no-header --no-annotate --quiet --upgrade --output-file requirements.lock
