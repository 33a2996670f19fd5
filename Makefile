# `make bench` and `make test` need Python 3.10 or newer with its headers, make and a C++ compiler, and start from nothing.
SHELL := bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Where the gpu targets write their results.
OUT ?= gpu-results
# Options of the benchmark: make bench BENCH="--op lstm --dtype bfloat16".
BENCH ?=
# Seconds that a gpu target takes at most, its build included.
GPU_LIMIT := 470
GPU_BUILD := RECATTN_BUILD_CUDA=1 timeout $(GPU_LIMIT) python3 setup.py build_ext --inplace
GPU_RUN := PYTHONPATH="$(CURDIR)" PYTHONUNBUFFERED=1

.DEFAULT_GOAL := help
CSRC_TEST_NAMES := $(patsubst csrc/tests/test_%.cpp,test-csrc-%,$(wildcard csrc/tests/test_*.cpp))
.PHONY: FORCE help setup bench test test-cuda test-csrc $(CSRC_TEST_NAMES) lint aot docs demo gpu gpu-test gpu-check gpu-bench clean

help:
	@echo "make setup      a virtual environment in $(VENV) with the development requirements and the package, built"
	@echo "make bench      what the kernels gain on this machine, on real data"
	@echo "make test       the tests, then those that run in Triton's interpreter"
	@echo "make test-csrc  the C++ of csrc alone, under AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make test-cuda  the CUDA kernels, emulated on the CPU, under AddressSanitizer (g++ on Linux)"
	@echo "make lint       ruff and mypy"
	@echo "make aot        every Triton and CUDA kernel compiled for every GPU architecture, without a GPU"
	@echo "make docs       the tables of README.md from what the package says of itself and from benchmarks/results"
	@echo "make demo       the adding problem, small"
	@echo "make gpu        gpu-test, gpu-check and gpu-bench, with the current python3 on an NVIDIA GPU; results in OUT=$(OUT)"
	@echo "make clean      removes what builds left; $(VENV) keeps what it downloaded"

$(VENV)/requirements.stamp: requirements-dev.txt
	@echo "Installing requirements-dev.txt into $(VENV); torch is large: the first time takes minutes"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# Written where it says something else: what depends on it is made again when the settings of the build change, and then
# only.
BUILD_SETTINGS = RECATTN_BUILD_CUDA=$${RECATTN_BUILD_CUDA:-0} RECATTN_CUDA_ARCHS=$$RECATTN_CUDA_ARCHS
$(VENV)/build.settings: FORCE | $(VENV)/requirements.stamp
	@echo "$(BUILD_SETTINGS)" | cmp -s - $@ || echo "$(BUILD_SETTINGS)" > $@

# The folders are listed too: their dates change when a source is added or removed.
$(VENV)/build.stamp: $(VENV)/requirements.stamp $(VENV)/build.settings setup.py pyproject.toml \
		$(filter-out csrc/tests%,$(wildcard csrc csrc/* csrc/*/*))
	@echo "Building csrc"
	@RECATTN_BUILD_CUDA=$${RECATTN_BUILD_CUDA:-0} $(BIN)/python setup.py --quiet build_ext --inplace
	@$(BIN)/python -c 'import runpy, sys; sys.exit(runpy.run_path("recattn_kernels/_build_info.py")["CPU"])'
	@echo "Installing recattn_kernels into $(VENV), editable"
	@RECATTN_BUILD_CUDA=$${RECATTN_BUILD_CUDA:-0} $(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation --editable .
	@touch $@

setup: $(VENV)/build.stamp

bench: setup
	$(BIN)/python -m recattn_kernels bench $(BENCH)

# A process a core, which takes tests from another when it has none left. Each has threads of its own, which must not
# spin while they wait for one another.
PYTEST = OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q --numprocesses auto --maxprocesses 8 --dist worksteal

test: setup
	$(PYTEST)
	TRITON_INTERPRET=1 $(PYTEST) -m interpret

# The sanitizer's library comes before Python's, which knows nothing of it; torch's own leaks are not of interest.
ASAN_LIBRARIES = $(shell g++ -print-file-name=libasan.so):$(shell g++ -print-file-name=libstdc++.so)
test-cuda: setup
	LD_PRELOAD="$(ASAN_LIBRARIES)" ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=0 \
		$(BIN)/python -m pytest -q tests/test_indrnn_cuda.py tests/test_gated_cuda.py

# As in setup.py: a kernel source is compiled once per instruction set, and so are the tests of cells.h.
CSRC_TESTS := build/csrc-tests
X86 := $(filter x86_64,$(shell uname -m))
ISAS := isa_base $(if $(X86),isa_v3 isa_v4)
isa_base := $(if $(X86),-march=x86-64)
isa_v3 := -march=x86-64-v3
isa_v4 := -march=x86-64-v4 -mprefer-vector-width=512
PER_ISA := $(filter-out csrc/cpu/bindings%,$(wildcard csrc/cpu/*.cpp)) csrc/tests/test_cells.cpp
ONCE := $(filter-out $(PER_ISA),$(wildcard csrc/tests/*.cpp))
SANITIZED = $(CXX) -std=c++20 -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=all -Wall -Wextra \
	-fno-math-errno -fno-trapping-math -ffp-contract=fast $$(cat $(CSRC_TESTS)/openmp)

# -fopenmp where the compiler, its headers and its linker have OpenMP.
$(CSRC_TESTS)/openmp:
	@mkdir -p $(@D)
	@echo '#include <omp.h>' > $@.cpp; echo 'int main() { return omp_get_max_threads() < 1; }' >> $@.cpp
	@if $(CXX) -fopenmp $@.cpp -o $@.probe 2> /dev/null; then echo -fopenmp; fi > $@

define CSRC_TESTS_RULE
$(CSRC_TESTS)/%.$(1).o: csrc/%.cpp $(CSRC_TESTS)/openmp
	@mkdir -p $$(@D)
	@echo "Compiling $$< for $(1)"
	@$$(SANITIZED) $($(1)) -DRECATTN_ISA=$(1) -MMD -MP -c $$< -o $$@
endef
$(foreach isa,$(ISAS),$(eval $(call CSRC_TESTS_RULE,$(isa))))
-include $(wildcard $(CSRC_TESTS)/*/*.d)

$(CSRC_TESTS)/run: $(foreach isa,$(ISAS),$(PER_ISA:csrc/%.cpp=$(CSRC_TESTS)/%.$(isa).o)) \
		$(ONCE:csrc/%.cpp=$(CSRC_TESTS)/%.isa_base.o)
	@$(SANITIZED) $^ -o $@

# A process each, for make -j. Their threads must not spin while they wait for one another.
test-csrc: $(CSRC_TEST_NAMES)
$(CSRC_TEST_NAMES): test-csrc-%: $(CSRC_TESTS)/run
	OMP_WAIT_POLICY=passive $< $*

lint: $(VENV)/requirements.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

aot: setup
	$(BIN)/python -m pytest -q --aot-full tests/test_aot.py tests/test_packaging.py::test_cuda_extension_builds_without_a_gpu

docs: setup
	$(BIN)/python -m recattn_kernels.bench.report

demo: setup
	$(BIN)/python examples/adding_problem.py --quick

gpu: gpu-test gpu-check gpu-bench

# SECONDS is the shell's own count since the recipe began. Interrupted, pytest still reports and writes its results.
gpu-test:
	@set -eo pipefail; mkdir -p "$(OUT)"; $(GPU_BUILD); \
	if python3 -c "import xdist" 2> /dev/null; then processes="--numprocesses auto --maxprocesses 8"; fi; \
	$(GPU_RUN) OMP_WAIT_POLICY=passive timeout --signal=INT --kill-after=30 $$(($(GPU_LIMIT) - SECONDS)) \
		python3 -m pytest -q -m cuda $$processes -p no:cacheprovider \
		--junitxml="$(OUT)/gpu-test.xml" 2>&1 | tee "$(OUT)/gpu-test.log"

# torch's caching allocator would hide most out-of-bounds accesses. Some virtual machines refuse the tool the device.
gpu-check:
	@set -eo pipefail; mkdir -p "$(OUT)"; $(GPU_BUILD); export PATH="$$PATH:$${CUDA_HOME:-/usr/local/cuda}/bin"; \
	if ! command -v compute-sanitizer; then echo "gpu-check: no compute-sanitizer here: nothing was checked"; exit; fi; \
	share=2; for tool in memcheck racecheck; do \
		log="$(OUT)/gpu-check-$$tool.log"; status=0; limit=$$((($(GPU_LIMIT) - SECONDS) / share)); share=1; \
		$(GPU_RUN) PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout $$limit compute-sanitizer --tool $$tool \
			--target-processes application-only --error-exitcode 1 \
			python3 -m recattn_kernels check --device cuda --backend cuda --quick 2>&1 | tee "$$log" || status=$$?; \
		if grep -q "Device not supported" "$$log"; then echo "gpu-check: $$tool refused this device"; \
		elif [ $$status = 124 ]; then echo "gpu-check: $$tool found nothing in the $$limit seconds that it had"; \
		elif [ $$status != 0 ]; then echo "gpu-check: $$tool failed (exit status $$status)"; exit $$status; fi; \
	done

gpu-bench:
	@set -eo pipefail; mkdir -p "$(OUT)"; $(GPU_BUILD); \
	$(GPU_RUN) timeout --signal=INT --kill-after=30 $$(($(GPU_LIMIT) - SECONDS)) \
		python3 -m recattn_kernels bench --device cuda $(BENCH) \
		--json "$(OUT)/gpu-bench.json" 2>&1 | tee "$(OUT)/gpu-bench.log"

clean:
	rm -rf build dist *.egg-info recattn_kernels/*.so recattn_kernels/_build_info.py $(VENV)/build.stamp
	rm -rf adding-results mnist-results char-lm-results captioning-results ram-results catch-results \
		slot-discovery-results slot-set-results
	rm -rf .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -path ./$(VENV) -prune -o -name __pycache__ -prune -exec rm -rf {} +
