# `make demo` and `make test` do all their set-up themselves, in .venv.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all lint format clean

.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tests]'
	touch $@

demo: .venv/installed
	$(BIN)/centralflow demo --output out

test: .venv/installed
	$(BIN)/python -m pytest

test-all: .venv/installed
	$(BIN)/python -m pytest -m 'slow or not slow'

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv out
