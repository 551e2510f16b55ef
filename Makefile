# The whole developer interface. `make demo` and `make test` need Python 3.11 or 3.12 and nothing else.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

# The first that runs: a version manager leaves names that lead nowhere.
PYTHON ?= $(shell for python in python3.11 python3.12 python3; do \
    if $$python -c 'import ensurepip, sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null; \
    then echo $$python; break; fi; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := uv pip compile pyproject.toml --universal --python-version 3.11 --fork-strategy fewest \
    --generate-hashes --no-header --no-annotate --quiet

.PHONY: help setup lock demo test lint bench faults clean

help:  ## Show this list.
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/'

$(STAMP): requirements.lock pyproject.toml
	@test -n '$(PYTHON)' || { echo 'Python 3.11 or 3.12 with its venv is not there: install it, or make PYTHON=/path/to/python3.11' >&2; false; }
	@echo 'Making the environment in $(VENV): two to five minutes, 6.4 GB'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps --editable .
	touch $(STAMP)

setup: $(STAMP)  ## Make the environment in .venv and nothing else.

lock: setup  ## Resolve all locks anew: hashes and versions only; needs uv.
	$(LOCK) --all-extras --upgrade --output-file requirements.lock
	$(LOCK) --constraint requirements.lock | awk '/^[^ ]/ { cuda = \
	    /^(torch|torchaudio|triton|nvidia-|cuda-)/ } { print > ("deploy/requirements" (cuda ? "-cuda" : "") ".lock") }'
	$(BIN)/python -m worker.services.jars

demo: setup  ## Tag sample tracks on a real Kafka and Redis; MUSIC=DIR for your own, KEEP=1 to keep it running.
	$(BIN)/timbre demo $(if $(MUSIC),--music "$(MUSIC)") $(if $(KEEP),--keep)

test: setup  ## Lint, types, and every test, on a real Kafka and Redis.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m pytest

lint: setup  ## Put the code in order: ruff's fixes and format.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

bench: setup  ## Rates of decoding alone, `timbre tag` and the worker, side by side.
	$(BIN)/python -m tests.performance.bench

faults: setup  ## Break real things while tracks pass, and count what is lost; NAME=... for one.
	$(BIN)/python -m tests.faults $(NAME)

clean:  ## Remove the environment and what was built.
	rm -rf $(VENV) build
