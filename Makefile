# make quickstart · make test · make bench. Everything is installed into .venv, once, and again when pyproject.toml changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart

.PHONY: quickstart test quick bench clean

quickstart: $(VENV)/.installed
	$(BIN)/nas search trials/quickstart.yaml --overwrite
	$(BIN)/nas export quickstart --pick knee --to $(RUN)/export
	$(BIN)/nas eval $(RUN)/export --text README.md --context 1024

test: $(VENV)/.installed-dev
	$(BIN)/ruff check nas tests
	$(BIN)/ruff format --check nas tests
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/pytest

quick: $(VENV)/.installed-dev
	$(BIN)/pytest -m "not slow"

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks

clean:
	rm -rf $(VENV) runs build *.egg-info

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
