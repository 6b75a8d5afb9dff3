# make quickstart · make test · make bench. Everything is installed into .venv: once, and again when pyproject.toml changes.
# Needs make, and Python 3.11 or newer with its venv module (on Debian: python3-venv). Another Python: make PYTHON=python3.12 …

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
TESTERS ?= 2

.PHONY: quickstart test quick lint bench clean

# Searches real text, prints the front, exports its knee, and measures what was exported.
quickstart: $(VENV)/.installed
	$(BIN)/nas search trials/quickstart.yaml --overwrite
	$(BIN)/nas export quickstart --pick knee --to $(RUN)/export
	$(BIN)/nas eval $(RUN)/export --text $(RUN)/eval.txt --windows 128

# Files are divided among TESTERS processes; a file's tests share what it takes long to make.
test: lint
	$(BIN)/pytest -n $(TESTERS) --dist loadfile

# The tests that take seconds, not minutes.
quick: $(VENV)/.installed-dev
	$(BIN)/pytest -n $(TESTERS) --dist loadfile -m "not slow"

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check nas tests reports
	$(BIN)/ruff format --check nas tests reports
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.installed-dev
	$(BIN)/python -m tests.benchmarks

# The runs stay: they are results.
clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find nas tests -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps are touched last, so an installation that was broken off is begun again.
$(VENV)/.installed: pyproject.toml
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet -e .
	touch $@

$(VENV)/.installed-dev: pyproject.toml | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -e '.[dev]'
	touch $@
