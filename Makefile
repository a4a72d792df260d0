# Two commands do everything: `make demo` and `make test`. Each installs into .venv first, if need be.
# Another Python: `make test PYTHON=python3.12`. Without a GPU, PyTorch's CPU wheels save gigabytes: set
# PIP_EXTRA_INDEX_URL to their index, as PyTorch's installation page gives it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
NATIVE := kernels/srcfast_kernels/_native.so

.PHONY: demo test simulated fault fuzz mutants oldest lint site clean

# Rationales for questions that have answers alone, an R-Scorer from them, the calibration. The same command continues.
demo: $(NATIVE)
	$(BIN)/python -m srcfast rationale srcfast/world/demo.yaml --output runs/demo-teacher
	$(BIN)/python -m srcfast teach srcfast/world/from_answers.yaml --adapter runs/demo-teacher --output runs/demo-taught.jsonl
	$(BIN)/python -m srcfast scorer srcfast/world/from_answers.yaml --scorer embedded --output runs/demo-r-scorer
	$(BIN)/python -m srcfast calibrate srcfast/world/from_answers.yaml

test: $(NATIVE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "not gpu and not simulated and not fault and not fuzz"
	SIMULATED_CUDA=2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope -m "(gpu or simulated) and not long"

# The simulated device's long forms: each preset on two devices, a calibration of each family in whole weights and in 4 bits.
simulated: $(NATIVE)
	SIMULATED_CUDA=2 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "simulated and long"

# A run killed at every point of writing and at random moments of every stage, and continued: some minutes.
fault: $(NATIVE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m fault -rA tests/system/fault

# Each parser is given thousands of malformed inputs; `make test` gives it a hundred.
fuzz: $(NATIVE)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m fuzz tests/system/malformed

# Small faults put into a copy of the source, one after the other; each must fail its tests. `make mutants PART=3/20`: a twentieth.
mutants: $(NATIVE)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutants/run_mutants.py $(if $(PART),--part $(PART))

# The tests of models on the oldest transformers of the pin in setup.py, in a folder of its own.
OLDEST := 5.17.0
oldest: $(NATIVE)
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .oldest transformers==$(OLDEST)
	PYTHONPATH=.oldest OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadscope tests/unit/models \
		-m "not gpu and not simulated and not fault and not fuzz"

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

# The documentation as pages to open or to serve, in site/; `make test` builds it, too.
site: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

$(STAMP): setup.py pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11) and 'srcfast needs Python 3.11 or newer: make PYTHON=...')"
	test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable ".[test,report,data,docs]"
	touch $(STAMP)

# Built after the installation, against the torch that will load it. Without a compiler srcfast runs, slower in places: see
# `srcfast doctor`.
$(NATIVE): $(STAMP) $(wildcard csrc/*)
	-$(BIN)/python -m pip install --quiet --no-build-isolation --no-deps --editable .

clean:
	rm -rf .oldest $(NATIVE) build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
