# `make demo` and `make test` need only python3 (3.11 or newer), make and pip.
# Each makes the virtual environment it needs; a second call starts at once.

PYTHON ?= python3
VENV ?= .venv
# Extras that the tests are run with; what needs another one is skipped.
EXTRAS ?= test

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One stamp for each set of extras, older than pyproject.toml when that changes.
comma := ,
stamp = $(VENV)/.installed-$(subst $(comma),-,$(1))

export JAX_PLATFORMS ?= cpu

.PHONY: help demo docs test fuzz coverage test-cuda-aot lint format bench clean
help:
	@echo "make demo      train small models with CAGE and see what it buys (12 minutes)"
	@echo "make test      run the tests (EXTRAS=test,oracles for those that need PyTorch and others)"
	@echo "make docs      build the pages of docs/ and the reference, in docs/_build/html"
	@echo "make fuzz      load 10,000 damaged model files (ten minutes)"
	@echo "make coverage  run them and count what they run, at least 95 %"
	@echo "make test-cuda-aot  compile the kernels for an H200 that need not be here"
	@echo "make lint      check format, style and types"
	@echo "make bench     measure the figures of benchmarks/README.md (over an hour)"
	@echo "make clean     remove the virtual environment and what the demo wrote"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cage_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "[setup] making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "[setup] installing cage_jax with the extras $(subst -,$(comma),$*): one to three minutes, once"
	@$(PIP) install --editable ".[$(subst -,$(comma),$*)]"
	@touch $@

demo: $(call stamp,demo)
	@$(BIN)/python examples/demo.py

# The reference is read from the modules, which need what they import.
docs: $(call stamp,test$(comma)docs)
	@echo "[docs] building docs/_build/html"
	@$(BIN)/python -m sphinx --quiet --fail-on-warning --keep-going -b html docs docs/_build/html
	@echo "[docs] open docs/_build/html/index.html"

test: $(call stamp,$(EXTRAS))
	@echo "[test] running the tests; half an hour on two cores"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

fuzz: $(call stamp,test)
	@echo "[fuzz] loading 10,000 damaged files"
	@$(BIN)/python tests/fuzzing.py

coverage: $(call stamp,$(EXTRAS))
	@echo "[coverage] running the tests and counting what they run; a sixth slower"
	@$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --cov --cov-report=term:skip-covered --cov-fail-under=95

test-cuda-aot: $(call stamp,test$(comma)cuda)
	@echo "[test] compiling for an H200; half a minute"
	@$(BIN)/python -m pytest tests/test_kernels_for_cuda.py

lint: $(call stamp,test$(comma)lint)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(call stamp,test$(comma)lint)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench: $(call stamp,test$(comma)oracles)
	@echo "[bench] the machine should have nothing else to do"
	@for name in import_time quantizers optimizer_step train_step curvature_cost layers sharding kills effect; do \
	  $(BIN)/python benchmarks/$$name.py || exit 1; \
	done
	@$(BIN)/python benchmarks/tables.py

clean:
	rm -rf $(VENV) runs docs/_build .pytest_cache .ruff_cache .mypy_cache
