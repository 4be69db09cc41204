# `make demo` and `make test` do all the set-up themselves, the virtual environment included.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := -m pip install --quiet --disable-pip-version-check
PIP_INSTALL := $(BIN)/python $(PIP) -c constraints.txt
REQUIREMENTS := pyproject.toml constraints.txt
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-oldest test-newest fuzz style quality docs bench dist clean

help:  ## Lists the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## Installs, then trains the embedded model four ways side by side: runs/demo.
	$(BIN)/hf-jd compare --output_dir runs/demo --overwrite

test: $(VENV)/.dev  ## Installs, then runs the tests, except for the slow ones.
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

test-all: $(VENV)/.dev  ## Installs, then runs all tests.
	$(PYTEST) $(PYTEST_ARGS)

# An older torch, such as 2.9.1, brings 3 GB of CUDA along: `make test-oldest OLDEST_TORCH=2.9.1`.
OLDEST := .venv-oldest
OLDEST_TORCH ?= 2.13.0
test-oldest: $(OLDEST)/.test  ## Runs the tests with the oldest releases that are supported.
	OMP_NUM_THREADS=1 $(OLDEST)/bin/python -m pytest -n 2 $(PYTEST_ARGS)

# What is newest changes by the day, so this is made anew each time.
NEWEST := .venv-newest
test-newest:  ## Runs the tests with the newest releases that there are.
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python $(PIP) -e ".[plot,test]"
	OMP_NUM_THREADS=1 $(NEWEST)/bin/python -m pytest -n 2 $(PYTEST_ARGS)

fuzz: $(VENV)/.dev  ## Tries 300 random small models against brute force.
	HF_JD_FUZZ=300 $(PYTEST) tests/gramian/test_fuzz.py

style: $(VENV)/.dev  ## Formats the code, and mends what can be mended by itself.
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

quality: $(VENV)/.dev  ## Checks style and types.
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/ty check

docs: $(VENV)/.docs  ## Builds the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(VENV)/.dev  ## Measures what the engine costs.
	$(BIN)/python scripts/benchmark.py engine

dist: $(VENV)/.dev  ## Builds wheel and sdist into dist/.
	rm -rf dist
	$(BIN)/python -m hatchling build

clean:  ## Removes the environment and all that was built; runs/ stays.
	rm -rf $(VENV) $(OLDEST) $(NEWEST) build dist site

# A stamp is newer than what it was installed from, so that a second `make` installs nothing.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(OLDEST)/.test: pyproject.toml constraints-oldest.txt
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python $(PIP) -c constraints-oldest.txt torch==$(OLDEST_TORCH) -e ".[plot,test]"
	@touch $@

$(VENV)/.demo: $(REQUIREMENTS) | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes the first time."
	$(PIP_INSTALL) -e ".[plot]"
	@touch $@

$(VENV)/.dev: $(REQUIREMENTS) | $(BIN)/python
	@echo "Installing into $(VENV); this takes some minutes the first time."
	$(PIP_INSTALL) -e ".[dev]"
	@touch $(VENV)/.demo $@

$(VENV)/.docs: $(REQUIREMENTS) | $(BIN)/python
	$(PIP_INSTALL) -e ".[plot,docs]"
	@touch $@
