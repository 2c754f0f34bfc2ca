# make demo   asks the small trained model in examples/ about images, and times long prompts
# make test   the test suite          make lint   ruff, pyright, order of the packages
# make test-fast  the suite without its slow tests: two minutes (TEST_OPTIONS="-k masks")
# make bench  the attention benchmark, e.g. make bench BENCH_OPTIONS="--tokens 75K --time-limit 540"
#
# Each installs what it needs into .venv first. PYTHON chooses the interpreter:
# make demo PYTHON=python3.12
#
# make train        trains a small model from scratch, or continues: 50 minutes (TRAIN_OPTIONS)
# make profile      finds the head categories of the model in examples/, or of yours (TRAINED)
# make evaluate     its accuracy on held-out prompts, dense and sparse: docs/evaluation.md
# make wheel-check  builds the wheel, installs it into a new environment and tries it there
#
# make gpu-check   checks and times the GPU kernels on this machine's GPU, beside what the model in
#                  docs/speed.md predicts. Installs nothing: PYTHON is any interpreter with a CUDA JAX
#                  and NumPy, and with jax-triton for the Triton kernels and gradients.

PYTHON ?= python3
VENV := .venv
VENV_PYTHON := $(VENV)/bin/python

# On the CPU unless told otherwise. On a GPU: .venv/bin/pip install -e ".[cuda12]", then
# make demo JAX_PLATFORMS=cuda
JAX_PLATFORMS ?= cpu
# transformers is used for tokenizers and images only: no advice that torch is missing.
TRANSFORMERS_NO_ADVISORY_WARNINGS ?= 1
export JAX_PLATFORMS TRANSFORMERS_NO_ADVISORY_WARNINGS

.DELETE_ON_ERROR:
.PHONY: demo test test-fast lint bench train profile evaluate gpu-check wheel-check clean

demo: $(VENV)/.installed-demo
	$(VENV_PYTHON) -m examples.demo

# Workers take tests from each other when they run out of their own.
WORKERS ?= 2
PYTEST := $(VENV_PYTHON) -m pytest -n $(WORKERS) --dist worksteal
test: $(VENV)/.installed-test
	$(PYTEST) $(TEST_OPTIONS)

test-fast: $(VENV)/.installed-test
	$(PYTEST) -m "not slow" $(TEST_OPTIONS)

lint: $(VENV)/.installed-test
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m pyright --pythonpath $(VENV_PYTHON)
	$(VENV)/bin/lint-imports

# A GPU, if JAX finds one: the CPU is not the default here.
bench: export JAX_PLATFORMS =
bench: $(VENV)/.installed-test
	$(VENV_PYTHON) -m benchmarks.attention $(BENCH_OPTIONS)

train: $(VENV)/.installed-train
	$(VENV_PYTHON) -m examples.train_small_vlm build/train $(TRAIN_OPTIONS)

# A checkpoint in Hugging Face format, of the training. After make train: TRAINED=build/train/checkpoint
TRAINED ?= examples/small-qwen2.5-vl
PROFILE_OPTIONS ?= --target-reduction 0.41 --refine --answer-tokens 2 --max-evaluations 160
PROFILED := build/profile/$(notdir $(TRAINED))
profile: $(VENV)/.installed-train $(PROFILED)/.converted
	$(VENV_PYTHON) -m examples.train_small_vlm.conversations build/profile/samples --count 128
	$(VENV_PYTHON) -m bsjax profile $(PROFILED)/converted build/profile/samples/scenes-seed-0.jsonl \
	  --resume $(PROFILED)/state --output $(PROFILED)/profile.json $(PROFILE_OPTIONS)

# Measurements belong to these weights: other weights, another state file.
$(PROFILED)/.converted: $(TRAINED)/model.safetensors | $(VENV)/.installed-train
	mkdir -p $(PROFILED)
	rm -rf $(PROFILED)/converted $(PROFILED)/state $(PROFILED)/evaluation.state
	$(VENV_PYTHON) -m convert $(TRAINED) $(PROFILED)/converted --quiet
	@touch $@

build/train/checkpoint/model.safetensors:
	@echo "error: there is no trained model in build/train/checkpoint. Train one first: make train"; exit 1

# The shipped profile, and the page in docs/, are those of the shipped checkpoint.
EVALUATED := $(if $(filter-out examples/small-qwen2.5-vl,$(TRAINED)),--checkpoint $(TRAINED) \
  --profile $(PROFILED)/profile.json --output build/evaluation --results build/evaluation)
evaluate: $(VENV)/.installed-train $(PROFILED)/.converted
	$(VENV_PYTHON) -m examples.evaluate $(EVALUATED) --resume $(PROFILED)/evaluation.state \
	  $(EVALUATE_OPTIONS)

gpu-check: export JAX_PLATFORMS =
gpu-check:
	$(PYTHON) -m tools.gpu_check $(GPU_CHECK_OPTIONS)

# -I: neither the repository nor the script's folder is on the path.
wheel-check: $(VENV)/.created
	rm -rf build/wheel && mkdir -p build/wheel/empty
	$(VENV_PYTHON) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	$(VENV_PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/python -m pip install --quiet build/wheel/*.whl
	cd build/wheel/empty && ../venv/bin/python -I $(CURDIR)/tools/wheel_check.py

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
