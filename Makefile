# `make help` lists the tasks. Each one makes its own environment in .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help setup distill distill-detection test test-all test-compat conformance lint docs bench gpu-check gpu-wheels schema clean

help: ## list the tasks
	@grep -E '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | column -t -s '|'

setup: $(INSTALLED) ## make the environment in .venv

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "unikd_fast needs Python 3.11 or newer, got $$($(PYTHON) --version); set PYTHON=python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# setuptools warns about every editable install
	PYTHONWARNINGS=ignore $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[train,test,bench,docs]'
	@touch $@

distill: setup ## distil on scikit-learn's digits and print the table (2 to 10 minutes on 2 cores)
	$(RUN) deepspeed launch_distill.py --config configs/digits.json --resume auto

distill-detection: setup ## distil detectors on generated scenes and print the table
	$(RUN) deepspeed launch_distill.py --config configs/toy_scenes.json --resume auto

# Processes that test side by side. In the order of the files, of which those that start runs come early; xdist itself
# would begin with the files of many, short tests, and end with one process waiting for the other.
TESTERS ?= 2

test: setup ## the test suite; TESTERS=2 processes
	$(RUN) pytest tests -n $(TESTERS) --dist loadfile --no-loadscope-reorder

test-all: test ## the test suite, then the long rounds of faults and combinations
	$(RUN) pytest tests -m long -n $(TESTERS) --dist loadfile

# The codebases that the drop-ins stand in for bring many packages along. They go into an environment on top of .venv.
COMPAT := $(VENV)/compat
SITE := -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])'

$(COMPAT)/.installed: $(INSTALLED)
	$(BIN)/python -m venv $(COMPAT)
	$(BIN)/python $(SITE) > "$$($(COMPAT)/bin/python $(SITE))/venv-below.pth"
	$(COMPAT)/bin/python -m pip install --quiet --constraint constraints.txt --editable '.[compat-test]'
	@touch $@

test-compat: $(COMPAT)/.installed ## the drop-in losses against torchdistill, timm, Liger-Kernel, TRL and Model Optimizer
	$(COMPAT)/bin/python -m pytest tests_compat

conformance: $(COMPAT)/.installed ## write docs/conformance.md: how closely the drop-in losses agree
	$(COMPAT)/bin/python -W ignore -m unikd_fast.compat.conformance docs/conformance.md

lint: setup ## ruff and mypy
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) mypy

docs: setup ## the site with the API reference, in site/
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --strict --quiet

bench: setup ## the benchmarks; correctness is asserted before anything is timed
	$(RUN) pytest benchmarks/ --benchmark-only

# A python named by PYTHON is used as it is: nothing is installed and no .venv is made.
CHECKED := $(if $(filter file default undefined,$(origin PYTHON)),,given)

gpu-check: $(if $(CHECKED),,setup) ## all GPU tests and benchmarks, 10 minutes; PYTHON=python3 takes that environment, OUT=folder
	PYTHONPATH=. $(if $(CHECKED),$(PYTHON),$(BIN)/python) benchmarks/gpu_check.py $(if $(OUT),--out $(OUT)) \
		$(if $(WHEELS),--wheels $(WHEELS))

gpu-wheels: setup ## wheels for gpu-check on a machine without a package index, in WHEELS=wheels
	$(BIN)/python benchmarks/gpu_wheels.py $(or $(WHEELS),wheels)

schema: setup ## write configs/schema.json and docs/configuration.md from the code
	$(BIN)/python -m unikd_fast.config schema > configs/schema.json
	$(BIN)/python -m unikd_fast.config reference > docs/configuration.md

clean: ## remove the environment and what tools left behind; runs/ stays
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
