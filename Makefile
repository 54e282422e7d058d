# make test    from nothing to a full test run
# make demo    from nothing to a decoded ragged batch: correctness, speed, a picture of the schedule
# make bench   this package and its peers on this machine, some three minutes; BENCH_ARGS=--full for the grid
# make lint    formatters and linters, in check mode; make format applies them

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml lean_attention/_build.py lean_attention/_version.py \
           $(shell find csrc -type f)

.PHONY: test demo bench lint format clean

test: $(VENV)/installed
	$(BIN)/python -m pytest $(TEST_ARGS)

demo: $(VENV)/installed
	$(BIN)/python -m lean_attention demo $(DEMO_ARGS)

bench: $(VENV)/peers
	$(BIN)/python -m benchmarks.cpu_decode $(BENCH_ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cu*')

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
