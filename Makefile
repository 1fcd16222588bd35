# `make demo` and `make test` need nothing but Python: they set up .venv first.

PYTHON ?= python3
# The build of torch that a new environment gets; e.g. TORCH=torch for a GPU.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin

.PHONY: help demo test lint format wheel clean

help:
	@echo "make demo     train a small network under every schedule, print a table, write a picture"
	@echo "make test     run all tests"
	@echo "make lint     check format, lint and types"
	@echo "make format   format and mend what can be mended"
	@echo "make wheel    build dist/*.whl"
	@echo "make clean    remove what these made"

demo: $(VENV)/demo.installed
	$(BIN)/python -m autolr_fast demo

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/dev.installed
	$(BIN)/python -m build --wheel

clean:
	rm -rf $(VENV) build dist *.egg-info autolr_demo.png autolr_demo.md

# torch comes first, so that installing the package never chooses a build of it.
$(VENV)/%.installed: pyproject.toml setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$(TORCH)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
