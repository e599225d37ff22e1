# Each target installs what it needs: `make demo`, `make test`, `make test-all`, `make lint`, `make docs`.
# `make test-oldest` and `make test-newest` test the oldest and newest supported versions of all
# dependencies, each in a separate environment.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Number of test processes; each test uses one thread.
WORKERS ?= 2
# Limits test-oldest and test-newest to some tests, e.g. TESTS=tests/pruning.
TESTS ?=

.PHONY: demo test test-all test-oldest test-newest lint docs
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m tinyfusion_pl

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

test-oldest test-newest: test-%: $(BIN)/python
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/python -m uv venv --quiet --clear --python $(BIN)/python $(VENV)-$*
	$(BIN)/python -m uv pip install --quiet --python $(VENV)-$*/bin/python --upgrade --resolution $(if $(filter oldest,$*),lowest-direct,highest) --editable ".[test]"
	$(VENV)-$*/bin/python -m pytest -n $(WORKERS) --dist loadfile $(TESTS)

lint: $(VENV)/.installed-dev
	$(BIN)/python -m ruff check
	$(BIN)/python -m ruff format --check
	$(BIN)/python -m mypy

# Builds the site into site/, which is not committed. Any warning fails the build.
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# The stamps repeat an installation only when pyproject.toml has changed. Editable installs need pip >= 21.3.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "pip>=21.3"
	$(BIN)/python -m pip install --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[docs]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null \
	  || { echo "$(PYTHON) was not found. Install Python 3.10 or newer, or set PYTHON: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), but Python 3.10 or newer is required. Set PYTHON: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
