# Every target works alone on a fresh machine that has Python 3.11 or newer, make and a C compiler: it makes .venv, installs what
# constraints.txt pins, and does its work. Which build of torch arrives (CPU or CUDA) is the package index's choice; pip's own
# settings (PIP_INDEX_URL, pip.conf) are honoured.

SHELL := /bin/sh
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(shell $(name) -c \
	'import sys; sys.version_info >= (3, 11) and print("$(name)")' 2>/dev/null)))
BIN := .venv/bin
STAMP := .venv/.installed
BENCH_STAMP := .venv/.installed-bench

# pip's pins hold for the packages that it builds in isolation, too. Not exported: what finback fetches is not ours to pin.
PIP_INSTALL := PIP_CONSTRAINT=constraints.txt PIP_BUILD_CONSTRAINT=constraints.txt PIP_DISABLE_PIP_VERSION_CHECK=1 \
	$(BIN)/python -m pip install --progress-bar off

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow check bench

help: ## show this list
	@awk 'BEGIN { FS = ":.*## " } /^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

install: $(STAMP) ## set up .venv: finback (editable) with every CPU extra

quickstart: $(STAMP) ## the whole small run, into runs/quickstart
	$(BIN)/finback quickstart

test: $(STAMP) ## all tests but the slow ones
	$(BIN)/python -m pytest -n auto --maxprocesses 8 --dist worksteal

test-slow: $(STAMP) ## the slow tests: load, hostile and many-seed proofs
	$(BIN)/python -m pytest -m slow

check: $(STAMP) ## format, lint and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(BENCH_STAMP) ## speed beside named peers in the same run, results as JSON in bench/results
	$(BIN)/python -m bench

# torch first: it is the largest by far, and the rest then fits it. A .venv without a working pip was interrupted: it is made anew.
$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "finback needs Python 3.11 or newer, and no python3 here is; install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "finback needs Python 3.11 or newer, and $(PYTHON) is older or does not run; name another: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) has no venv module; install it (on Debian and Ubuntu: apt-get install python3-venv) and run make again" >&2; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) --editable '.[report,data,hub,serve,rl,test]'
	@touch $(STAMP)

# The peers of the benchmarks that nothing else needs.
$(BENCH_STAMP): $(STAMP)
	$(PIP_INSTALL) --editable '.[report,data,hub,serve,rl,test,bench]'
	@touch $(BENCH_STAMP)
