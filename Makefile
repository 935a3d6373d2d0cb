# make quickstart · make test · make check · make bench · make proofs
# Each makes .venv first, where it is missing or was made for another pyproject.toml, constraints.txt or place.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready-$(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export WANDB_MODE ?= offline
# Two OpenMP threads on two busy cores can be 17 times slower than one.
export OMP_WAIT_POLICY ?= PASSIVE
quickstart test check proofs: export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check proofs bench setup clean
.DEFAULT_GOAL := quickstart

quickstart: $(STAMP)
	$(RUN) -m steerl quickstart

test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

# A quick look before a commit: of the fast tests, one case of each.
check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist worksteal -q -m "not slow and not proofs and not gpu and not browser" --few 1 $(ARGS)

# The long ones, by hand; their figures go into docs/log with the command.
proofs: $(STAMP)
	$(RUN) -m pytest -m proofs --timeout 0 -s $(ARGS)

bench: $(STAMP)
	$(RUN) -m steerl bench $(ARGS)

setup: $(STAMP)

# torch first and pinned: left to another package's wish, pip may fetch a second build of it.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or later with venv and pip is needed; PYTHON=path names one" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev,deepspeed]'
	@rm -f $(VENV)/.ready-*
	@touch $(STAMP)

clean:
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache
