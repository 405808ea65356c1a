# `make help` lists the tasks. Each one makes its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup distill test lint bench schema clean

help: ## list the tasks
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(INSTALLED) ## make the environment in .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "unikd_fast needs Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,test,bench]'
	@touch $@

distill: setup ## distil on scikit-learn's digits and print the table (2 minutes on 2 cores)
	$(RUN) deepspeed launch_distill.py --config configs/digits.json --resume auto

test: setup ## the test suite
	$(RUN) pytest tests

lint: setup ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

bench: setup ## the benchmarks; correctness is asserted before anything is timed
	$(RUN) pytest benchmarks/ --benchmark-only

schema: setup ## write configs/schema.json and docs/configuration.md from the code
	$(BIN)/python -m unikd_fast.config schema > configs/schema.json
	$(BIN)/python -m unikd_fast.config reference > docs/configuration.md

clean: ## remove the environment and what tools left behind; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
