# make demo   the main job on the small checkpoint in examples/ and two photographs
# make test   the test suite          make lint   ruff and pyright
# make bench  the attention benchmark, e.g. make bench BENCH_OPTIONS="--tokens 75K --time-limit 540"
#
# Each makes what it needs in .venv first. PYTHON chooses the interpreter: make demo PYTHON=python3.12
#
# make gpu-check   the GPU kernels on the GPU at hand: right, and how fast. Makes nothing: PYTHON is
#                  any interpreter with a CUDA JAX and NumPy.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python

# On the CPU unless told otherwise. On a GPU: .venv/bin/pip install -e ".[cuda12]", then
# make demo JAX_PLATFORMS=cuda
JAX_PLATFORMS ?= cpu
# transformers is used for tokenizers and images only, and need not mention that torch is missing.
TRANSFORMERS_NO_ADVISORY_WARNINGS ?= 1
export JAX_PLATFORMS TRANSFORMERS_NO_ADVISORY_WARNINGS

.DELETE_ON_ERROR:
.PHONY: demo test lint bench gpu-check clean

demo: $(VENV)/.installed-demo
	$(VENV_PYTHON) examples/demo.py

test: $(VENV)/.installed-test
	$(VENV_PYTHON) -m pytest

lint: $(VENV)/.installed-test
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)

# A GPU, if JAX finds one: the CPU is no default here.
bench: export JAX_PLATFORMS =
bench: $(VENV)/.installed-test
	$(VENV_PYTHON) -m benchmarks.attention $(BENCH_OPTIONS)

gpu-check: export JAX_PLATFORMS =
gpu-check:
	$(PYTHON) -m tools.gpu_check $(GPU_CHECK_OPTIONS)

clean:
	rm -rf $(VENV) build

$(VENV)/.created:
	@command -v $(PYTHON) > /dev/null \
	  || { echo "error: '$(PYTHON)' was not found. Install Python 3.11 or newer, or name one: make PYTHON=/path/to/python3.12"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "error: bsjax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Name a newer one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.installed-%: $(VENV)/.created pyproject.toml
	$(VENV_PYTHON) -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	@touch $@
