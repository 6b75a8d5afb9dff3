# make quickstart · make test · make test-all · make docs · make bench. Everything is installed into .venv: once, and again when pyproject.toml changes.
# Needs make, and Python 3.11 or newer with its venv module (on Debian: python3-venv). Another Python: make PYTHON=python3.12 …

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
TESTERS ?= 2
PYTEST := $(BIN)/pytest -n $(TESTERS) --dist worksteal

.PHONY: quickstart test test-all quick lint docs bench dist clean

# Searches real text, prints the front, exports its knee, and evaluates the export.
quickstart: $(VENV)/.installed
	$(BIN)/nas search trials/quickstart.yaml --overwrite
	$(BIN)/nas export quickstart --pick knee --to $(RUN)/export
	$(BIN)/nas eval $(RUN)/export --text $(RUN)/test.txt --eval-sequences 128

# What every change must pass: ten minutes on two cores.
test: lint docs
	$(PYTEST) -m "not slow"

# Everything, before a release: full products over presets, every trainer, every recipe of the docs.
test-all: lint
	$(PYTEST)

# Laws of the core, without Ray, MLflow, a browser or a trainer: two minutes.
quick: $(VENV)/.installed-dev
	$(PYTEST) -m "not slow and not service"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check nas tests reports docs
	$(BIN)/ruff format --check nas tests reports docs
	$(BIN)/mypy
	$(BIN)/lint-imports

# The pages as a site, build/site/index.html; a link that leads nowhere is an error.
docs: $(VENV)/.installed-dev
	$(BIN)/python docs/site.py

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks

# The wheel and the source archive, as a package registry wants them.
dist: $(VENV)/.installed-dev
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The runs stay: they are results.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find nas tests reports -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so an interrupted installation is begun again.
$(VENV)/.installed: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
