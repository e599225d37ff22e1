# Each target does all the set-up that it needs: `make demo`, `make test`, `make test-all`, `make lint`, and `make test-oldest` and
# `make test-newest`, which test the oldest and the newest versions of all libraries in environments of their own.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run tests; each test itself uses one thread.
WORKERS ?= 2
# Of test-oldest and test-newest: a part of the tests, e.g. TESTS=tests/pruning.
TESTS ?=

.PHONY: demo test test-all test-oldest test-newest lint
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

# The stamps make an installation happen again only when pyproject.toml has changed. pip < 21.3 installs no editable packages.
$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet "pip>=21.3"
	$(BIN)/python -m pip install --editable ".[test]"
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	@touch $@

$(BIN)/python:
	@command -v "$(PYTHON)" > /dev/null \
	  || { echo "There is no $(PYTHON). Install Python 3.10 or newer, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
	  || { echo "$(PYTHON) is $$("$(PYTHON)" -V 2>&1), but 3.10 or newer is needed. Name one: make PYTHON=python3.12" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV) || { rm -rf $(VENV); exit 1; }
