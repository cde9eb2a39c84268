# Everything here works on a fresh machine with python3 (3.10 to 3.14, with its venv module) and make.
# PYTHON=python3.12 make demo   chooses another interpreter.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

PYTHON ?= python3
DEMO_VENV ?= .venv-demo
VENV ?= .venv
OUT ?= out/demo
# Files of tests that run at a time. Many wait more than they compute: one more than there are cores.
JOBS ?= $(shell echo $$(( $$(getconf _NPROCESSORS_ONLN) + 1 )))
# One thread in each: several that compete for the cores take a third more time.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(JOBS) --dist loadfile
PACKAGES := edge_common engines transport cloud_node edge_runtime exporters

# $(call venv,DIRECTORY): make a virtual environment there unless one exists; say what is missing if it can't be made.
define venv
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 15))' || { \
	  echo "error: $(PYTHON) is not Python 3.10 to 3.14; run 'make PYTHON=python3.12 ...'" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
	  echo "error: $(PYTHON) lacks its venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1)
endef

.PHONY: help
help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 16

.PHONY: demo
demo: $(DEMO_VENV)/.ready ## Segment a photo through three cloud nodes on this machine (no torch; result in out/demo)
	@$(DEMO_VENV)/bin/edge-runtime demo --out $(OUT)

.PHONY: test
test: lint types ## Lint, types and all tests, in the full environment
	$(PYTEST)

.PHONY: check
check: lint types ## Lint, types and every quick test that starts no process: about three minutes
	$(PYTEST) -m "not process and not slow"

.PHONY: lint
lint: $(VENV)/.ready ## Lint and format check
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

.PHONY: types
types: $(VENV)/.ready ## Type check
	$(VENV)/bin/mypy $(PACKAGES)

.PHONY: format
format: $(VENV)/.ready ## Rewrite the sources in the project's format
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

.PHONY: images
images: $(VENV)/.ready ## Make the README's pictures again, from a run of the demo
	$(VENV)/bin/edge-runtime demo --out $(OUT)
	cp $(OUT)/overlay.png $(OUT)/what-each-node-saw.png docs/images
	$(VENV)/bin/python docs/images/how_it_works.py

.PHONY: gpu
gpu: ## On a machine with an NVIDIA GPU: run the GPU tests, then measure every engine (GPU_ARGS=--resume)
	@$(PYTHON) -m exporters.gpu --check
	@status=0; tests=$$(grep -rl --include='test_*.py' 'mark\.gpu' tests || true); \
	if [ -n "$$tests" ] && $(PYTHON) -c 'import pytest' 2>/dev/null; then \
	  $(PYTHON) -m pytest -m gpu $$tests || status=$$?; fi; \
	$(PYTHON) -m exporters.gpu $(if $(NAME),--name $(NAME)) $(GPU_ARGS) || status=$$?; exit $$status

.PHONY: fuzz
fuzz: $(VENV)/.ready ## Fuzz everything that reads a peer's bytes (SECONDS=600; better with atheris in the environment)
	@PYTHONPATH=tests $(VENV)/bin/python -m fuzz --seconds $(or $(SECONDS),600)

.PHONY: reliability
reliability: $(VENV)/.ready ## Measure the reliability rows (FORM=long: hours; MACHINE="what it runs on")
	@export PYTHONPATH=tests; status=0; \
	$(VENV)/bin/python -m reliability --form $(or $(FORM),short) $(if $(MACHINE),--machine "$(MACHINE)") || status=$$?; \
	$(VENV)/bin/python -m reliability --doc; exit $$status

.PHONY: venv
venv: $(VENV)/.ready ## The full environment (about 6 GB, with torch; Linux x86-64)

.PHONY: lock
lock: ## Resolve the dependencies anew and rewrite requirements/*.txt (Python 3.11 or newer)
	$(PYTHON) requirements/lock.py

.PHONY: check-locks
check-locks: $(DEMO_VENV)/.ready ## Prove that every wheel a Jetson needs exists, by downloading it (about 100 MB)
	@$(DEMO_VENV)/bin/python requirements/lock.py --check

.PHONY: clean
clean: ## Remove what builds, tests and the demo leave behind (not the virtual environments)
	rm -rf build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find $(PACKAGES) tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(DEMO_VENV)/.ready: requirements/cpu.txt pyproject.toml
	$(call venv,$(DEMO_VENV))
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/cpu.txt
	$(DEMO_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@

$(VENV)/.ready: requirements/dev.txt pyproject.toml
	$(call venv,$(VENV))
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -r requirements/dev.txt
	$(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -e .
	@touch $@
