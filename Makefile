# From a bare checkout, with python3 (3.10 or newer), g++ (11 or newer) and make:
#   make demo    make a virtual environment, install, and show sparse attention on a video
#   make test    the same, and run the tests
# Both reuse the environment they find. pip's own settings apply, so on a machine without a GPU
#   PIP_EXTRA_INDEX_URL=<the CPU index of PyTorch> make demo
# fetches the small CPU build of torch instead of the one with CUDA.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install -q -c constraints-dev.txt
INSTALLED := $(VENV)/.installed

# Processes that test side by side, each with one thread: the tests are many and small. No more
# than four, because some hold gigabytes.
WORKERS ?= $(shell echo $$(( $$(nproc) < 4 ? $$(nproc) : 4 )))
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

NATIVE_SOURCES := $(shell find csrc -type f 2>/dev/null)
CXX_SOURCES := $(filter %.cpp %.h %.hpp %.cu %.cuh,$(NATIVE_SOURCES))
BUILD_FILES := pyproject.toml setup.py CMakeLists.txt $(wildcard cmake/* tools/build_*.py)

.PHONY: help demo test test-all lint format bench build wheel clean distclean
.DELETE_ON_ERROR:

help:
	@echo "make demo      install into $(VENV) and run the demo"
	@echo "make test      install into $(VENV) and run the tests"
	@echo "make test-all  the tests, and the slow ones: ways of installing, Triton for all chips"
	@echo "make lint      ruff, clang-format, mypy"
	@echo "make format    let ruff and clang-format rewrite the sources"
	@echo "make bench     run the benchmarks, which write benchmarks/results"
	@echo "make build     compile the native components into the source tree"
	@echo "make wheel     one wheel with every component, in dist/; needs nvcc, no GPU"
	@echo "make clean     remove what builds leave; make distclean: and $(VENV)"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python 3.10 or newer is needed, $(PYTHON) is not; choose one: make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# torch comes first and alone: the package is compiled for the torch that is there.
$(VENV)/.dependencies: constraints-dev.txt pyproject.toml | $(BIN)/python
	$(PIP) torch==2.13.0
	$(PIP) setuptools cmake ninja
	@touch $@

# Editable: changed Python files need no new install, changed native sources do. The compile runs
# first and by itself, because pip hides what it builds.
$(INSTALLED): $(VENV)/.dependencies $(BUILD_FILES) $(NATIVE_SOURCES)
	$(BIN)/python setup.py -q build_ext --inplace
	$(PIP) --no-build-isolation -e ".[dev]"
	@touch $@

demo: $(INSTALLED)
	$(BIN)/video-attn demo $(DEMO_ARGS)

test: $(INSTALLED)
	$(PYTEST) $(TEST_ARGS)

test-all: $(INSTALLED)
	$(PYTEST) -m "slow or not slow" $(TEST_ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(if $(CXX_SOURCES),$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES))
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(if $(CXX_SOURCES),$(BIN)/clang-format -i $(CXX_SOURCES))

bench: $(INSTALLED)
	@for script in benchmarks/bench_*.py; do \
	  echo "== $$script"; $(BIN)/python $$script $(BENCH_ARGS) || exit 1; done

build: $(VENV)/.dependencies
	$(BIN)/python setup.py build_ext --inplace

# A wheel that travels: compiled CUDA code for every architecture that has some, against torch's
# stable ABI (torch 2.10 and newer), so that the machine it goes to needs no compiler. What cannot
# be built is an error. The component for CPUs is for the torch of this environment.
WHEEL_ARCHS ?= 80,89,90a,120
wheel: $(VENV)/.dependencies
	VIDEO_ATTN_BUILD_EXT=1 VIDEO_ATTN_CUDA_ARCHS="$(WHEEL_ARCHS)" \
	  $(BIN)/python setup.py -q bdist_wheel --dist-dir dist
	@ls -lh dist

clean:
	rm -rf build dist python/*.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	rm -f python/video_attn/_*.so python/video_attn/_*.json $(INSTALLED)
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
