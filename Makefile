# `make demo` trains a small GPT, `make test` runs all tests. Both create .venv. Another torch: make demo TORCH="torch==2.11.0".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
XLA := .venv-xla
DEEPSPEED ?= deepspeed==0.19.*
DEEPSPEED_VENV := .venv-deepspeed
PYTEST := $(BIN)/python -m pytest
PARALLEL := -n auto --maxprocesses 8 --dist worksteal
# The name of the stamp depends on TORCH, so that another TORCH reinstalls.
STAMP := $(VENV)/.$(subst =,-,$(subst >,,$(TORCH)))

.PHONY: demo test test-fast test-portable test-xla test-deepspeed test-slurm slurm-up slurm-down check format docs docs-layouts site clean help

help:
	@echo "make demo            train a small GPT on the sources of Python's standard library (about 5 minutes on 2 cores)"
	@echo "make test            all tests"
	@echo "make test-fast       the tests that are not marked slow (90 seconds on 2 cores)"
	@echo "make test-portable   the numeric tests under every instruction set of this processor"
	@echo "make test-xla        the XLA engine on 8 virtual devices of this CPU, in .venv-xla (torch 2.9; Linux on x86-64)"
	@echo "make test-slurm      chained jobs on a real Slurm, in network namespaces of this machine (8 minutes; needs root)"
	@echo "make test-deepspeed  the DeepSpeed engine, in an environment of its own (.venv-deepspeed; 7 minutes on 2 cores)"
	@echo "make slurm-up        start that Slurm cluster: munged, slurmctld and four nodes; make slurm-down stops it"
	@echo "make check           format, lint, types, import contracts, spelling, file sizes, README"
	@echo "make format          format and fix the files for 'make check'"
	@echo "make docs            regenerate docs/arguments.md"
	@echo "make docs-layouts    train every layout and rewrite the table in docs/parallelism.md (several minutes)"
	@echo "make site            build the documentation as static pages in build/site (half a minute)"
	@echo "make clean           remove .venv and the output of the demo"

$(STAMP): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "megatron_lite needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable . "$(TORCH)"
	@rm -f $(VENV)/.torch* && touch $@

$(STAMP)-dev: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[dev]" "$(TORCH)"
	@touch $@

$(STAMP)-site: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[site]" "$(TORCH)"
	@touch $@

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart.sh

test: $(STAMP)-dev
	$(PYTEST) $(PARALLEL)

# All folders, without tests marked slow, which start several ranks or train for long: 90 s on 2 cores.
test-fast: $(STAMP)-dev
	$(PYTEST) $(PARALLEL) -m "not slow"

# The numeric tests under each instruction set of this processor, in a few minutes: no bound may depend on it.
test-portable: $(STAMP)-dev
	$(BIN)/python tests/support/portable.py

# torch_xla needs a torch of its own version, so that its tests have an environment of their own.
$(XLA)/.installed: setup.py tests/xla/install.sh tests/xla/cuda_stubs.py
	tests/xla/install.sh $(XLA) $(PYTHON)
	@touch $@

test-xla: $(XLA)/.installed
	$(XLA)/bin/python -m pytest tests/xla

# Debian packages slurm-wlm, munge and iproute2; without them the tests fail. They use a cluster of their own.
test-slurm: $(STAMP)-dev
	$(PYTEST) tests/slurm

# An environment of its own: DeepSpeed is no dependency of anything else. The tests of NVMe compile its operator there, and
# are skipped without libaio-dev and g++.
$(DEEPSPEED_VENV)/.ready: setup.py
	$(PYTHON) -m venv $(DEEPSPEED_VENV)
	$(DEEPSPEED_VENV)/bin/pip install --quiet "$(TORCH)"
	DS_BUILD_OPS=0 $(DEEPSPEED_VENV)/bin/pip install --quiet --editable ".[deepspeed]" "$(DEEPSPEED)" "$(TORCH)" \
		"pytest>=8" "pytest-timeout>=2.3" "hypothesis>=6.100"
	@touch $@

test-deepspeed: $(DEEPSPEED_VENV)/.ready
	$(DEEPSPEED_VENV)/bin/python -m pytest tests/deepspeed

slurm-up:
	@$(PYTHON) tests/slurm/cluster.py up

slurm-down:
	@$(PYTHON) tests/slurm/cluster.py down

check: $(STAMP)-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell
	$(BIN)/python tools/check_house.py

format: $(STAMP)-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)-dev
	$(BIN)/python -m megatron_lite.config.reference

docs-layouts: $(STAMP)-dev
	PYTHONPATH=tests $(BIN)/python tests/support/parallelism_page.py

# Broken links are errors. The pages need neither a server nor a network.
site: $(STAMP)-site
	$(BIN)/python tools/build_site.py

clean:
	rm -rf $(VENV) $(XLA) $(DEEPSPEED_VENV) runs build *.egg-info
