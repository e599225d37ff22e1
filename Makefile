# Each target does all the set-up that it needs: `make demo`, `make test`, `make test-all`, `make lint`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Processes that run tests; each test itself uses one thread.
WORKERS ?= 2

.PHONY: demo test test-all lint
.DELETE_ON_ERROR:

demo: $(VENV)/.installed
	$(BIN)/python -m tinyfusion_pl

test: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-all: $(VENV)/.installed
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m ""

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
