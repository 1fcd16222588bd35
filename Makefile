# `make demo` and `make test` need nothing but Python: they set up .venv first.

PYTHON ?= python3
# The build of torch that a new environment gets; e.g. TORCH=torch for a GPU.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: help demo test lint format docs wheel bench clean

help:
	@echo "make demo     train a small network under every schedule, print a table, write two pictures"
	@echo "make test     run all tests"
	@echo "make lint     check format, lint and types"
	@echo "make format   format and mend what can be mended"
	@echo "make docs     build the documentation into site/; a warning is an error"
	@echo "make wheel    build dist/: the sdist, and a wheel with operators compiled for Python >= 3.10 and torch >= 2.11"
	@echo "make bench    measure operators, probes, searches and memory, write benchmarks/results/; 20 minutes"
	@echo "make clean    remove what these made"

demo: $(VENV)/demo.installed
	$(BIN)/python -m autolr_fast demo

test: $(VENV)/dev.installed
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(VENV)/dev.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/dev.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/docs.installed
	$(BIN)/mkdocs build --strict

wheel: $(VENV)/wheel.installed
	rm -rf dist
	$(BIN)/python -m build --no-isolation
	$(BIN)/python -m twine check --strict dist/*

bench: $(VENV)/dev.installed
	mkdir -p build
	$(BIN)/python -m pytest benchmarks/test_ops.py --benchmark-json=build/ops.json
	$(BIN)/python -m benchmarks.report build/ops.json ops
	$(BIN)/python -m pytest benchmarks/test_probe.py --benchmark-json=build/probe.json
	$(BIN)/python -m benchmarks.report build/probe.json probe
	$(BIN)/python -m benchmarks.host_time
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m pytest benchmarks/test_tree.py --benchmark-json=build/tree.json
	$(BIN)/python -m benchmarks.report build/tree.json tree

clean:
	rm -rf $(VENV) build dist site *.egg-info autolr_demo.png autolr_demo.md autolr_demo_run.png autolr_fast/*.so

# What these install is fast enough without compiled operators, and there sooner. The wheel itself is compiled.
$(VENV)/demo.installed $(VENV)/docs.installed $(VENV)/wheel.installed: export AUTOLR_FAST_BUILD ?= none

# torch comes first: installing the package never chooses a build of it, and the operators compile against it.
$(VENV)/%.installed: pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install "$(TORCH)" "setuptools>=77" "setuptools-scm>=8" ninja
	$(PIP) install --no-build-isolation --editable ".[$*]"
	touch $@
