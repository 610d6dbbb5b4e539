# Two commands matter: `make demo` trains a GPT in front of you, `make test` runs every test.
# Both make their own .venv. Another torch: make demo TORCH="torch==2.11.0".

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
# pip's stamp depends on what was asked for, so that changing TORCH reinstalls.
STAMP := $(VENV)/.$(subst =,-,$(subst >,,$(TORCH)))

.PHONY: demo test test-fast test-portable check format docs clean help

help:
	@echo "make demo     train a small GPT on this machine's own Python sources (about 5 minutes on 2 cores)"
	@echo "make test     the whole test suite"
	@echo "make test-fast     the tests that are not marked slow, in 90 seconds"
	@echo "make test-portable   the numeric tests with the rounding of every processor that this one can imitate"
	@echo "make check    format, lint, types, import contracts, spelling, sizes, README"
	@echo "make format   rewrite the files as 'make check' wants them"
	@echo "make docs     regenerate the pages that are made from code"
	@echo "make clean    remove .venv and what the demo wrote"

$(STAMP): setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "megatron_lite needs Python 3.10 or newer: make $(MAKECMDGOALS) PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable . "$(TORCH)"
	@rm -f $(VENV)/.torch* && touch $@

$(STAMP)-dev: $(STAMP)
	$(BIN)/pip install --quiet --editable ".[dev]" "$(TORCH)"
	@touch $@

demo: $(STAMP)
	PATH="$(abspath $(BIN)):$$PATH" examples/quickstart.sh

test: $(STAMP)-dev
	$(BIN)/python -m pytest

# Every folder of tests, without those marked slow: they start several ranks or train for long. 90 s on 2 cores.
test-fast: $(STAMP)-dev
	$(BIN)/python -m pytest -m "not slow"

# The numeric tests under each instruction set that this processor has, in a few minutes: no bound may depend on it.
test-portable: $(STAMP)-dev
	$(BIN)/python tests/support/portable.py

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
	$(BIN)/python tests/support/parallelism_page.py

clean:
	rm -rf $(VENV) runs build *.egg-info
