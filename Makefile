# Two commands on a fresh machine (python3 with venv and pip, make, git):
#   make bench    time every kernel against its NumPy reference and print the table
#   make test     run the tests
# Others: bench-full, bench-peers, bench-models, latency (imports, first calls, other pools, forks), ladder (docs/cpu-kernels.md),
# test-avx2, gpu-compile (every GPU kernel for every architecture, without a GPU), gpu-check (tests and timings on the
# machine's GPU, installing nothing), targets, report, lint, typecheck, clean. Settings: PYTHON=python3.12, VENV=folder,
# EXTRAS=peers (compare with PyTorch and ONNX Runtime in the tests), JOBS=n (test processes), ARGS="..." (for pytest).

PYTHON ?= python3
VENV ?= .venv
EXTRAS ?=
JOBS ?= 2
ARGS ?=
# A release with CPU builds: an open requirement would bring gigabytes of CUDA.
TORCH ?= torch==2.13.0

PY := $(VENV)/bin/python
INSTALL := $(PY) -m pip install --quiet --disable-pip-version-check
INSTALLED := $(VENV)/.installed
RECORDS := .asv/records.jsonl
KERNEL_TESTS := $(foreach family,activation batchnorm conv dropout epilogue gemm half padding pool threads,$(wildcard tests/test_$(family)*.py))
# The figures belong to a commit where there is one (a source archive has none).
ASV_COMMIT = $(shell git rev-parse --verify --quiet HEAD >/dev/null 2>&1 && echo --set-commit-hash=HEAD)

.PHONY: bench bench-full bench-peers bench-models latency ladder test test-avx2 gpu-compile gpu-check lint typecheck targets report clean
.DELETE_ON_ERROR:

$(PY):
	$(PYTHON) -m venv $(VENV)

# One stamp for each set of extras; "test" is what the tests need, peers what they compare with.
$(INSTALLED)-bench: EXTRA := bench
$(INSTALLED)-lint: EXTRA := lint
$(INSTALLED)-test: EXTRA := test,bench,train,plot,io,log,gpu
$(INSTALLED)-test-peers: EXTRA := test,bench,train,plot,io,log,gpu,peers
$(INSTALLED)-test-peers: MORE := "$(TORCH)"
$(INSTALLED)-%: pyproject.toml | $(PY)
	@echo "installing tilewise[$(EXTRA)] into $(VENV) ..."
	@$(INSTALL) --editable ".[$(EXTRA)]" $(MORE)
	@touch $@

bench: $(INSTALLED)-bench
	@$(PY) -m tilewise.benchmarks.report --devices
	@$(PY) -m tilewise warmup --bench
	@mkdir -p .asv && rm -f $(RECORDS)
	@$(VENV)/bin/asv machine --yes >/dev/null
	@# asv's exit code is not ours: the report names the cases without a result, and fails for them.
	@-TILEWISE_BENCH_RECORDS="$(CURDIR)/$(RECORDS)" $(VENV)/bin/asv run --python=same $(ASV_COMMIT)
	@$(PY) -m tilewise.benchmarks.report --records $(RECORDS)

bench-full: export TILEWISE_BENCH_SUITE = full
bench-full: bench

test: $(INSTALLED)-test$(EXTRAS:%=-%)
	$(PY) -m pytest -n $(JOBS) --dist loadfile $(ARGS)

# The kernels' tests once more, compiled for a processor with AVX2 and without AVX-512 (where `test` was for one with it).
test-avx2: $(INSTALLED)-test$(EXTRAS:%=-%)
	@if $(PY) tests/processors.py; then \
		TILEWISE_TEST_PROCESSOR=avx2 $(PY) -m pytest -n $(JOBS) --dist loadfile $(KERNEL_TESTS) $(ARGS); fi

gpu-compile: $(INSTALLED)-test$(EXTRAS:%=-%)
	@PYTHONPATH=tests $(PY) -m gpu_compile $(ARGS)

# With the interpreter at hand and what is installed for it: no network, no pip, under eight minutes.
gpu-check:
	@$(PYTHON) tests/gpu_check.py $(ARGS)

lint: $(INSTALLED)-lint
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check

# Against a plain, not editable installation: there a module that the wheel forgets is missing for the type checker too.
typecheck: $(INSTALLED)-lint $(INSTALLED)-test$(EXTRAS:%=-%)
	@rm -rf build
	@$(INSTALL) --no-deps --no-build-isolation --target build/typecheck .
	$(VENV)/bin/basedpyright --pythonpath $(PY)

targets: $(INSTALLED)-test-peers
	@$(PY) -m tilewise.benchmarks.targets

# Every engine, both thread counts, batch 1, 8 and 64: it takes long. ARGS='--only "conv forward" --batch 8' for a part.
bench-peers: $(INSTALLED)-test-peers
	@$(PY) -m tilewise.benchmarks.peers $(ARGS)

# Whole networks beside PyTorch and ONNX Runtime, about five minutes. ARGS='--only "ResNet-18" --threads 2' for a part,
# ARGS="--json --readme README.md" to keep the figures.
bench-models: $(INSTALLED)-test-peers
	@$(PY) -m tilewise.benchmarks.models $(ARGS)

# Each figure in fresh processes, with a cache folder of their own: about ten minutes. ARGS='--only fork' for a part.
latency: $(INSTALLED)-bench
	@$(PY) -m tilewise.benchmarks.latency $(ARGS)

# From three loops to the tuned kernels, step by step; fills the tables of docs/cpu-kernels.md. With PyTorch if installed.
ladder: $(INSTALLED)-bench
	@$(PY) -m tilewise.benchmarks.ladder

report: $(INSTALLED)-bench
	@$(PY) -m tilewise.benchmarks.report --readme README.md

clean:
	rm -rf build dist .asv .benchmarks .cache .pytest_cache .ruff_cache *.egg-info
	find . -name __pycache__ -not -path "./$(VENV)/*" -prune -exec rm -rf {} +
