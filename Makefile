# `make help` lists what can be made. Set-up is done once, and again when a file that it reads changes.

VENV      ?= .venv
PYTHON    ?= python3
PORT      ?= 8000
PLATFORMS ?= cpu sim tpu cuda rocm
ARGS      ?=
SEEDS     ?= 20000

BIN     := $(VENV)/bin
# Modules are compiled when they are first used: most of what torch and transformers bring never is.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check --no-compile \
           --constraint constraints.txt
INPUTS  := Makefile pyproject.toml constraints.txt
PYTEST  := $(BIN)/python -m pytest
KIT     := $(PYTEST) --pyargs dovetail.core.conformance --platform

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.SECONDARY:
.PHONY: help setup serve test test-core test-triton test-reference determinism aot lint format
.PHONY: thorough cross bench bench-cpu bench-cuda certify simulate clean
.PHONY: $(PLATFORMS:%=test-%)

help: ## Show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))
	@printf "  make %-14s %s\n" $(foreach p,$(PLATFORMS),"test-$(p)" "Test the platform $(p) with its own packages only, and certify it")
	@echo
	@echo "  Settings: VENV=$(VENV) PYTHON=$(PYTHON) PORT=$(PORT) PLATFORMS='$(PLATFORMS)' ARGS=..."

setup: $(VENV)/.dev ## Make the virtual environment, with everything that work on Dovetail needs

serve: $(VENV)/.platform-cpu ## Serve the bundled model on PORT (ARGS are added to the command)
	$(BIN)/dovetail serve --port $(PORT) $(ARGS)

test: $(VENV)/.dev ## Check style and types, then run every test that can run here
	$(MAKE) --jobs 2 --output-sync=target lint $(patsubst %,test-%,$(filter cpu,$(PLATFORMS)))
	$(MAKE) test-core test-triton test-reference $(patsubst %,test-%,$(filter-out cpu,$(PLATFORMS)))

# Several processes of one thread each: models made for tests are too small to share out. The cpu
# platform is certified with all threads, as users run it.
PARALLEL := --numprocesses auto
test-core test-triton test-reference $(patsubst %,test-%,$(filter-out cpu,$(PLATFORMS))): export OMP_NUM_THREADS ?= 1
test-cpu: PARALLEL =
test-reference test-cpu: export PYTEST_PLUGINS = tests.core.conformance.unsupported

# The command is started hundreds of times: it is compiled once.
unexport PYTHONDONTWRITEBYTECODE

test-core: $(VENV)/.tools $(VENV)/.platform-cpu ## Test everything but the plug-ins (ARGS are given to pytest)
	$(PYTEST) tests $(PARALLEL) --dist loadfile --no-loadscope-reorder $(ARGS)

# Where there is no GPU, kernels are interpreted, which is slow: the whole kit is for `make certify`.
NO_GPU := $(if $(wildcard /dev/nvidia0 /dev/kfd),0,1)
test-triton test-cuda test-rocm: export TRITON_INTERPRET ?= $(NO_GPU)
test-cuda: export DOVETAIL_CUDA_SIMULATE ?= $(NO_GPU)
test-rocm: export DOVETAIL_ROCM_SIMULATE ?= $(NO_GPU)
ifeq ($(NO_GPU),1)
test-cuda: SKIP = -k 'contract or ops.'
test-rocm: SKIP = --conformance-level 1
endif

test-triton: $(VENV)/.tools ## Test the Triton kernels, and compile them for GPUs of several generations
	$(PYTEST) tests/attention_backends/triton tests/platforms/gpu tests/gpu_targets $(PARALLEL) --dist loadfile $(ARGS)

test-reference: $(VENV)/.tools ## Certify the reference platform, with which others are compared
	$(KIT) reference $(PARALLEL) $(ARGS)

# Where there is no TPU, the host stands in for eight; its kernels have tests of their own, and
# what XLA makes of bfloat16 there is not what it makes of it on a TPU.
test-tpu: export DOVETAIL_TPU_SIMULATE ?= 8
test-tpu: SKIP = -k 'not pallas and not ((attention or ops) and bfloat16) and $(SOME_FAMILIES)'
test-sim: SKIP = -k '$(SOME_FAMILIES)'
# The reference platform and the cpu's run models of all families, and `make certify` has the others.
SOME_FAMILIES := not (tokens and (mistral or qwen2 or phi3 or opt))

$(PLATFORMS:%=test-%): test-%: $(VENV)/.tools $(VENV)/.platform-%
	$(PYTEST) plugins/dovetail-$*/tests $(PARALLEL) $(ARGS)
	$(KIT) $* $(SKIP) $(PARALLEL) $(ARGS)

certify: export OMP_NUM_THREADS ?= 1
certify: $(VENV)/.dev ## Certify sim, tpu, cuda and rocm with the whole kit, simulated, kernels interpreted (an hour)
	$(KIT) sim --numprocesses auto
	DOVETAIL_TPU_SIMULATE=8 $(KIT) tpu --numprocesses auto
	DOVETAIL_CUDA_SIMULATE=1 TRITON_INTERPRET=1 $(KIT) cuda --numprocesses auto
	DOVETAIL_ROCM_SIMULATE=1 TRITON_INTERPRET=1 $(KIT) rocm --numprocesses auto

thorough: export OMP_NUM_THREADS ?= 1
thorough: EACH = $(PYTEST) -m thorough --numprocesses auto
thorough: $(VENV)/.dev ## Run the cases that `make test` has only a sample of (ten minutes)
	$(EACH) tests --dist loadfile
	TRITON_INTERPRET=1 $(EACH) tests/attention_backends/triton tests/platforms/gpu
	TRITON_INTERPRET=1 $(PYTEST) -p tests.uninitialised tests/attention_backends tests/platforms --numprocesses auto
	$(EACH) plugins/dovetail-sim/tests
	DOVETAIL_TPU_SIMULATE=8 $(EACH) plugins/dovetail-tpu/tests
	DOVETAIL_CUDA_SIMULATE=1 TRITON_INTERPRET=1 $(EACH) plugins/dovetail-cuda/tests

determinism: $(VENV)/.dev ## Run the whole determinism matrix (many minutes)
	DOVETAIL_DETERMINISM=full $(BIN)/python -m pytest tests/system/test_determinism.py --timeout 3600 $(ARGS)

aot: $(VENV)/.dev ## Compile kernels for six GPUs, and kernels and a model for four TPUs, without any (700 MB)
	DOVETAIL_GPU_TARGETS=all TRITON_INTERPRET=1 $(PYTEST) tests/gpu_targets $(ARGS)
	$(INSTALL) --no-deps --quiet --target $(VENV)/libtpu 'libtpu==0.0.42.*'
	TPU_LIBRARY_PATH=$(abspath $(VENV))/libtpu/libtpu/libtpu.so \
	    $(PYTEST) plugins/dovetail-tpu/tests/test_aot.py -s $(ARGS)

cross: ## Check the cpu kernels for other processors, emulated (needs cross compilers and qemu-user)
	plugins/dovetail-cpu/cross/check.sh

lint: $(VENV)/.dev ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.dev ## Mend what can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.platform-cpu ## Measure throughput with the bundled model (ARGS are added to the command)
	$(BIN)/dovetail bench throughput --num-prompts 100 --input-len 256 --output-len 64 $(ARGS)

bench-cpu: $(VENV)/.platform-cpu ## Measure the CPU with made-up weights, beside other engines if you name them (ARGS are added)
	$(BIN)/python -m benchmarks.cpu $(ARGS)

bench-cuda: $(VENV)/.platform-cuda ## Certify and measure one NVIDIA GPU in ten minutes, with made-up weights (ARGS are added)
	$(BIN)/python -m benchmarks.cuda $(ARGS)

simulate: $(VENV)/.runtime ## Run 20,000 seeds of the simulator (SEEDS=n for another number)
	$(BIN)/python -m dovetail.core.simulate --seeds $(SEEDS) $(ARGS)

clean: ## Remove the virtual environment and everything else that was made
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage .coverage.*
	find . -name '*.egg-info' -prune -exec rm -rf {} +
	find . -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	    { echo "Dovetail needs Python 3.11 or later: make PYTHON=python3.12 ..."; exit 1; }
	@echo "Making a virtual environment in $(VENV)."
	@$(PYTHON) -m venv $(VENV) || \
	    { echo "Python's venv module is missing (on Debian: apt-get install python3-venv)."; exit 1; }

$(VENV)/.runtime: $(INPUTS) | $(BIN)/python
	@echo "Installing Dovetail and torch. The first time this takes a few minutes."
	$(INSTALL) torch --editable .
	@touch $@

$(VENV)/.platform-%: plugins/dovetail-%/pyproject.toml $(VENV)/.runtime
	$(INSTALL) $$(test -e $(VENV)/.tools && echo --no-build-isolation) --editable plugins/dovetail-$*
	@touch $@

$(VENV)/.tools: $(VENV)/.runtime
	@echo "Installing the tools."
	$(INSTALL) --editable '.[dev]'
	@touch $@

# All plug-ins at once: each start of pip takes some seconds.
$(VENV)/.dev: $(VENV)/.tools $(PLATFORMS:%=plugins/dovetail-%/pyproject.toml)
	@echo "Installing the plug-ins: $(PLATFORMS)."
	$(INSTALL) --no-build-isolation $(PLATFORMS:%=--editable plugins/dovetail-%)
	@touch $@ $(PLATFORMS:%=$(VENV)/.platform-%)
