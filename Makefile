# make test    from nothing to a full test run
# make demo    from nothing to a decoded ragged batch: correctness, speed, a picture of the schedule
# make bench   this package and its peers on this machine, some three minutes; BENCH_ARGS=--full for the grid
# make sanitize    the CUDA kernels' tests on the emulated device under AddressSanitizer and UBSan
# make cuda-check  what nvcc makes of the kernels: registers, spills, instructions; needs a CUDA toolkit, no GPU
# make lint    formatters and linters, in check mode; make format applies them

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
CUDA_CHECK_ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml lean_attention/_build.py lean_attention/_version.py \
           $(shell find csrc -type f)

CXX_FILES = $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: test demo bench sanitize cuda-check lint format clean

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TEST_ARGS)

demo: $(VENV)/installed
	$(BIN)/python -m lean_attention demo $(DEMO_ARGS)

bench: $(VENV)/peers
	$(BIN)/python -m benchmarks.cpu_decode $(BENCH_ARGS)

# The sanitizers' libraries come before python's own; python itself leaks by design.
sanitize: $(VENV)/installed
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	  $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  LEAN_ATTENTION_EMULATION_SANITIZE=1 \
	  $(BIN)/python -m pytest -m "not gpu" tests/emulation tests/test_cuda.py $(TEST_ARGS)

cuda-check: $(VENV)/installed third_party/cuda-check-requirements.txt
	$(BIN)/python -m pip install --quiet -r third_party/cuda-check-requirements.txt
	$(BIN)/python -m benchmarks.cuda_check $(CUDA_CHECK_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build demo-output *.egg-info lean_attention/_C*.so
	rm -f $(VENV)/installed

# torch comes before the package: the core is compiled against the torch that runs it.
$(VENV)/torch: Makefile
	@command -v c++ >/dev/null || { echo "make: a C++ compiler is needed (on Debian: apt-get install g++)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet 'setuptools>=77' wheel ninja 'pybind11>=2.12' numpy '$(TORCH)'
	touch $@

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	$(BIN)/python -m pip install --quiet --no-build-isolation --editable '.[demo,test,lint]'
	touch $@

$(VENV)/peers: $(VENV)/installed third_party/benchmark-requirements.txt
	$(BIN)/python -m pip install --quiet -r third_party/benchmark-requirements.txt
	touch $@
