# Needs Python 3.11 or newer, and make; everything else goes into .venv, from a lock file.
#
#   make quickstart    train a small model on the embedded tasks and evaluate it
#   make test          set up, lint, type check, quick tests
#   make help          the other targets

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help quickstart test test-all lint format lock clean python

# 3.12 and 3.11 first: for 3.13 some dependencies have no wheel yet and need a C++ compiler.
CANDIDATES := python3.12 python3.11 python3 python python3.13 python3.14
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for name in $(CANDIDATES); do \
	$$name -c "$(NEW_ENOUGH)" 2>/dev/null && echo $$name && break; done)

BIN := .venv/bin
READY := .venv/ready
AOT := .venv/aot
BEAM := .venv/beam
TORCH := .venv/torch-ready
# Which lock file fits the interpreter of .venv.
LOCKED = $$($(BIN)/python -c "import sys; print('py311' if sys.version_info < (3, 12) else 'py312')")
# Two processes: compiling is most of the work, and uses one core. A file stays in one process.
WORKERS ?= 2
# Files in the order of collection: conftest.py has the longest first.
PYTEST := $(BIN)/pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
QUICK := not slow and not data and not torch and not aot and not gpu
UV ?= uv
LOCK = $(UV) pip compile setup.py --quiet --extra test --universal --custom-compile-command "make lock"

help: ## show the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

quickstart: $(READY) ## train a small model on the embedded tasks and evaluate it zero-shot
	@echo "==> mtl-jax train --gin_file=gin/runs/quickstart.gin"
	@$(BIN)/mtl-jax train --gin_file=gin/runs/quickstart.gin

test: lint ## lint, type check and the quick tests
	@echo "==> quick tests"
	@$(PYTEST) -m "$(QUICK)"

test-all: $(TORCH) $(AOT)/ready $(BEAM)/ready ## the tests that need time, PyTorch, the data folder (MTL_JAX_DATA) or a GPU
	@echo "==> the other tests"
	@$(PYTEST) -m "not ($(QUICK)) and not aot"
	@echo "==> kernels compiled for devices that are not here"
	@PYTHONPATH=$(AOT) $(PYTEST) -m aot tests/test_*aot.py

lint: $(READY) ## ruff and mypy
	@echo "==> ruff, mypy"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

format: $(READY) ## let ruff mend what it can
	@$(BIN)/ruff check --fix .
	@$(BIN)/ruff format .

# Keeps the pinned versions that still fit; all the newest: make lock LOCK_FLAGS=--upgrade
lock: ## write requirements/*.txt anew from setup.py (needs uv)
	@command -v $(UV) >/dev/null || { echo "make lock needs uv: pip install uv" >&2; exit 1; }
	@# Python 3.11 has no newest jax; "fewest" keeps one version of it in the file for 3.11.
	$(LOCK) $(LOCK_FLAGS) --python-version 3.11 --fork-strategy fewest -o requirements/py311.txt
	$(LOCK) $(LOCK_FLAGS) --python-version 3.12 -o requirements/py312.txt

clean: ## remove .venv, builds and caches (not runs/)
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

python:
	@test -n "$(PYTHON)" || { \
		echo "Python 3.11 or newer is needed; name it with: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c "$(NEW_ENOUGH)" || { \
		echo "$(PYTHON) is not Python 3.11 or newer; name one with: make PYTHON=/path/to/python3" >&2; \
		exit 1; }

$(READY): setup.py mtl_jax/__init__.py requirements/py311.txt requirements/py312.txt | python
	@echo "==> .venv for $$($(PYTHON) --version)"
	@test -x $(BIN)/python || $(PYTHON) -m venv .venv || { \
		rm -rf .venv; echo "venv is missing; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	@lock=$(LOCKED); \
	echo "==> installing requirements/$$lock.txt (a few minutes, about 2 GB)"; \
	$(BIN)/python -m pip install -qq -r requirements/$$lock.txt
	@echo "==> installing mtl_jax"
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

$(TORCH): $(READY) requirements/torch.txt
	@echo "==> installing requirements/torch.txt (PyTorch and Hugging Face, to compare with)"
	@$(BIN)/python -m pip install -qq -c requirements/$(LOCKED).txt -r requirements/torch.txt
	@touch $@

$(AOT)/ready: $(READY) requirements/aot-py311.txt requirements/aot-py312.txt
	@echo "==> installing requirements/aot-$(LOCKED).txt into $(AOT) (compilers, about 1 GB)"
	@rm -rf $(AOT)
	@$(BIN)/python -m pip install -qq --no-deps --target $(AOT) -r requirements/aot-$(LOCKED).txt
	@touch $@

$(BEAM)/ready: $(READY) requirements/beam.txt
	@echo "==> installing requirements/beam.txt into $(BEAM) (Apache Beam, about 170 MB)"
	@rm -rf $(BEAM)
	@$(BIN)/python -m pip install -qq --no-deps --target $(BEAM) -r requirements/beam.txt
	@touch $@
