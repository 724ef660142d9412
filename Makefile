# Run `make help` for the targets. Each sets up what it needs: a fresh clone is enough.

PYTHON ?= python3
# Test processes. Each runs torch on one thread, so that results do not depend on the machine and two of them fill
# the two cores of a small CI machine; most of the tests' time is Python and tiny models, which no second thread helps.
WORKERS ?= 2

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet
READY := $(VENV)/.ready
# Other versions, laid over the environment by PYTHONPATH.
OLDEST := $(VENV)/oldest
OLDEST_TRITON := $(VENV)/oldest-triton
NEWEST_TRITON := $(VENV)/newest-triton

pinned = $(shell sed -n 's/^$(1)==//p' $(2))
PAIR := $(call pinned,transformers,constraints.txt),$(call pinned,peft,constraints.txt)
OLDEST_PAIR := $(call pinned,transformers,constraints-oldest.txt),$(call pinned,peft,constraints-oldest.txt)
# A file's pins as "triton==3.6.0,numpy==2.3.5": the tests stop where other versions are imported, or one is skipped.
comma := ,
empty :=
expected = $(subst $(empty) $(empty),$(comma),$(strip $(shell sed -n '/^[a-z]/p' $(1))))
# worksteal gives each process a run of neighbouring tests, which share fixtures, and evens out at the end.
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal
INTERPRETED := tests/kernels_interpreted tests/gpu tests/test_op_contract.py
OLDEST_TESTS = $(shell grep -ls 'mark\.oldest' tests/test_*.py) # others take time to import
NOT_INTERPRETED := tests --ignore=tests/kernels_interpreted

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help test test-cpu test-interpreter test-oldest-pair test-oldest test-newest-triton compile-check bench gpu \
	demo demo-adapters quality env clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-18s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

test: test-cpu test-interpreter test-oldest-pair ## all tests that need no GPU (those that do are skipped where there is none)

test-cpu: $(READY) ## the tests on the newest pair of transformers and peft
	@echo "== tests, transformers and peft $(PAIR)"
	@SIBO_EXPECT_PAIR=$(PAIR) $(PYTEST) $(NOT_INTERPRETED)

test-oldest-pair: $(OLDEST)/.ready ## the tests marked `oldest` on the oldest pair of transformers and peft
	@echo "== tests, transformers and peft $(OLDEST_PAIR)"
	@SIBO_EXPECT_PAIR=$(OLDEST_PAIR) PYTHONPATH="$(CURDIR)/$(OLDEST)" $(PYTEST) -m oldest $(OLDEST_TESTS)

# Triton exists on Linux only.
ifeq ($(shell uname -s),Linux)
# A process of its own: the interpreter must be chosen before triton is imported.
test-interpreter: $(READY) ## the Triton kernels' values, in Triton's interpreter
	@echo "== Triton kernels, interpreted"
	@TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED)

test-oldest: test-oldest-pair $(OLDEST_TRITON)/.ready ## the oldest pair, and the kernels' tests on the oldest Triton
	@$(call kernel_tests,$(OLDEST_TRITON),constraints-oldest-triton.txt)

test-newest-triton: $(NEWEST_TRITON)/.ready ## the kernels' tests on the newest Triton
	@$(call kernel_tests,$(NEWEST_TRITON),constraints-newest-triton.txt)

define kernel_tests
	export SIBO_EXPECT_VERSIONS=$(call expected,$(2)) PYTHONPATH="$(CURDIR)/$(1)"; \
	echo "== Triton kernels, interpreted, on $$SIBO_EXPECT_VERSIONS"; \
	TRITON_INTERPRET=1 $(PYTEST) $(INTERPRETED); \
	echo "== Triton kernels, compiled, on $$SIBO_EXPECT_VERSIONS"; \
	$(PYTEST) tests/kernels_compiled
endef
else
test-oldest: test-oldest-pair
test-interpreter test-oldest test-newest-triton:
	@echo "== Triton kernels: not run, Triton exists on Linux only"
endif

compile-check: $(READY) ## compile every kernel for every target: spills, shared memory... (40 minutes on 2 cores)
	@$(BIN)/python -m benchmarks.compile_check --workers $(WORKERS)

bench: $(READY) ## count and time what needs no GPU (4 minutes; writes benchmarks/ and the README's tables)
	@$(BIN)/python -m benchmarks.traffic
	@$(BIN)/python -m benchmarks.cpu
	@$(BIN)/python -m benchmarks.host_time
	@$(BIN)/python -m benchmarks.plots
	@$(BIN)/python -m benchmarks.readme_table

# The running Python, as it is: torch must be the build for the device.
gpu: ## tests and benchmarks on this machine's CUDA device, by $(PYTHON) as it is; QUICK=1 takes under 8 minutes
	@$(PYTHON) -m benchmarks.gpu $(if $(QUICK),--quick)

demo: $(READY) ## train a small model, then fine-tune it with LoRA and SIBO-LoRA (about 3 minutes; writes demo-output/)
	@$(BIN)/sibo-triton demo

demo-adapters: $(READY) ## the same with bottleneck adapters, plain and SIBO's (writes demo-adapters-output/)
	@$(BIN)/sibo-triton demo --adapters --output demo-adapters-output

quality: $(READY) ## ruff, formatting, mypy
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

env: $(READY) ## what a bug report needs
	@$(BIN)/python -P sibo_triton/environment.py

clean: ## remove the environment, builds, caches and the demos' output
	rm -rf $(VENV) build dist *.egg-info demo-output demo-adapters-output .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# torch comes first and by plain pip: the build that the machine's index offers then satisfies `torch==` below,
# whatever its local label. setuptools comes before the editable install, which uses it without build isolation.
$(READY): setup.py pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=...")'
	@echo "== setting up $(VENV) (minutes the first time)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-compile torch==$(call pinned,torch,constraints.txt)
	@$(PIP) install --no-compile -c constraints.txt setuptools
	@$(PIP) install --no-compile -c constraints.txt --no-build-isolation -e '.[dev]'
	@touch $@

$(OLDEST)/.ready: constraints-oldest.txt
$(OLDEST_TRITON)/.ready: constraints-oldest-triton.txt
$(NEWEST_TRITON)/.ready: constraints-newest-triton.txt
$(OLDEST)/.ready $(OLDEST_TRITON)/.ready $(NEWEST_TRITON)/.ready: | $(READY)
	@echo "== setting up $(@D)"
	@rm -rf $(@D)
	@$(PIP) install --no-compile --no-deps --target $(@D) -r $<
	@touch $@
