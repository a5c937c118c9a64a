# Every target makes its own environment in .venv, from a bare clone with python3 and make.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Relative, since pip splits these at spaces. The second is what newer pips build with.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check bench simulate chaos format constraints clean

help:
	@echo "make demo        the original's examples, computed by real executors"
	@echo "make test        all tests"
	@echo "make check       ruff, mypy --strict, import contracts"
	@echo "make bench       tree reduction beside dask.distributed; all it can: ARGS=--help"
	@echo "make simulate    more protocol simulation: SEEDS=100000"
	@echo "make chaos       jobs while everything fails that may: SECONDS=60 SEED=0"

demo: $(VENV)/.demo
	$(BIN)/wukong demo

test: $(VENV)/.test
	$(BIN)/pytest -n 2 --dist loadfile $(ARGS)

check: $(VENV)/.check
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks $(or $(ARGS),run tr1024)

SEEDS ?= 100000
simulate: $(VENV)/.test
	$(BIN)/python -m tests.simulation --seeds $(SEEDS)

SECONDS ?= 60
SEED ?= 0
chaos: $(VENV)/.test
	$(BIN)/python -m tests.chaos --seconds $(SECONDS) --seed $(SEED)

format: $(VENV)/.check
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# One stamp for each extra, so that `make demo` does not wait for test tools.
$(VENV)/.%: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[$*]'
	@touch $@

# Types of everything that the tests use are checked, so both sets are needed.
$(VENV)/.check: pyproject.toml constraints.txt | $(BIN)/pip
	$(BIN)/pip install --quiet --editable '.[check,test]'
	@touch $@

$(BIN)/pip:
	$(PYTHON) -m venv $(VENV)

# Newest versions of everything, tried in an environment of their own.
constraints:
	rm -rf $(VENV)-new
	$(PYTHON) -m venv $(VENV)-new
	PIP_CONSTRAINT= PIP_BUILD_CONSTRAINT= $(VENV)-new/bin/pip install --quiet '.[demo,bench,compare,test,check]' hatchling editables
	$(VENV)-new/bin/pip freeze --exclude wukong-async > constraints.txt
	rm -rf $(VENV)-new

clean:
	rm -rf $(VENV) $(VENV)-new .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
