# `make demo`, `make test` and `make docs` do all their set-up themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all docs lint format clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tests]'
	touch $@

demo: .venv/installed
	$(BIN)/centralflow demo --output out

test: .venv/installed
	$(BIN)/python -m pytest

test-all: .venv/installed
	XLA_FLAGS= $(BIN)/python -m pytest -m 'slow or not slow'

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@

# The variable silences an announcement of the theme's authors.
docs: .venv/installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out site
