# `make demo` and `make test` are all a newcomer types; both set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
GPU := $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
TORCH := 2.13.0
TRITON := 3.8.0

export OMP_NUM_THREADS ?= 1
export OPENBLAS_NUM_THREADS ?= 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

.PHONY: help demo test native sanitizer static traffic lint gpu bench clean

help:
	@echo "make demo       train a small GPT on real text with and without fusekit; report and plots in runs/"
	@echo "make test       lint, static lane, traffic, sanitizer lane, native tests; no GPU needed"
	@echo "make gpu        tests/gpu natively, kernels, models, tuning; needs a CUDA GPU, no network"
	@echo "                MINUTES=9 bounds it, WHEELS=folder adds rivals from pure-Python wheels"
	@echo "make lint       ruff and mypy"
	@echo "make clean      remove environments and generated files"

demo: .venv/ready
	$(BIN)/python -m fusekit train --compare

# The static lane keeps two cores busy by itself. Of the rest two parts run at a time, a core each: the sanitizer lane,
# the native tests in three parts by their files' first letters, and traffic. What each prints comes when it is done,
# so that its closing lines stay whole.
test: lint static
	@echo "sanitizer lane, native tests in three parts and traffic, two at a time; their output comes at their end"
	@$(MAKE) --no-print-directory -j2 --keep-going --output-sync=target \
	  sanitizer native-a-f native-r-z native-g-q traffic

native: .venv/ready
	$(BIN)/python -m pytest

native-%: .venv/ready
	$(BIN)/python -m pytest $(sort $(wildcard tests/test_[$*]*.py))

sanitizer: .venv/ready
	$(BIN)/python -m ttsem.sanitize pytest tests/gpu -q

static: .venv/ready .venv-triton36/ready
	$(BIN)/python -m benchmarks.static

traffic: .venv/ready
	$(BIN)/python -m benchmarks.traffic

# The packages fusekit, fusekit.kernels and fusekit.passes are mapped from three folders; mypy wants one tree.
lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf .farm && mkdir -p .farm/fusekit
	ln -s $(CURDIR)/fusekit/*.py $(CURDIR)/kernels $(CURDIR)/passes .farm/fusekit/
	ln -s $(CURDIR)/benchmarks .farm/benchmarks
	cd .farm && ../$(BIN)/mypy --config-file ../pyproject.toml -p fusekit -p benchmarks

# One command for a machine with a GPU and no network: MINUTES=9, WHEELS=folder of pure-Python wheels of rivals.
MINUTES ?= 9
gpu: .venv/gpu
	$(BIN)/python -m benchmarks.gpu --minutes $(MINUTES) $(if $(WHEELS),--wheels "$(WHEELS)")

clean:
	rm -rf .venv .venv-triton36 .farm .static build dist *.egg-info

# torch's CUDA wheels ask for a Triton of their own, its CPU wheels for none: triton comes alone and last. The
# constraint keeps every later package from moving torch. Where a GPU is, the torch that is installed stays.
ifeq ($(GPU),yes)
.venv/ready: pyproject.toml Makefile .venv/gpu
	$(BIN)/python -m pip install -q -c .venv/constraints.txt -e ".[train,models,tests,benchmarks,lint]"
	touch $@
else
.venv/ready: pyproject.toml Makefile
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q torch==$(TORCH)
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > .venv/constraints.txt
	$(BIN)/pip install -q "setuptools>=77"
	$(BIN)/pip install -q -c .venv/constraints.txt -e ".[train,models,tests,benchmarks,lint]"
	$(BIN)/pip install -q --no-deps triton==$(TRITON)
	$(BIN)/pip install -q --no-deps --ignore-requires-python ttsem==0.1.0
	touch $@
endif

# The environment sees the packages of $(PYTHON), also where that is itself a virtual environment, whose packages
# --system-site-packages would pass over. Nothing is fetched where PyTorch is there.
.venv/gpu: pyproject.toml Makefile
	$(PYTHON) -m venv --without-pip .venv
	$(PYTHON) -c "import sys; print(*[p for p in sys.path if p.endswith('-packages')], sep='\n')" \
	  > "$$($(BIN)/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
	$(BIN)/python -c "import torch" || $(BIN)/python -m pip install -q torch
	$(BIN)/python -c "import torch; print('torch==' + torch.__version__)" > .venv/constraints.txt
	$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e .
	$(BIN)/python -c "import numpy, rich" || $(BIN)/python -m pip install -q -c .venv/constraints.txt numpy rich
	touch $@

.venv-triton36/ready:
	$(PYTHON) -m venv .venv-triton36
	.venv-triton36/bin/pip install -q triton==3.6.0 numpy setuptools
	touch $@
