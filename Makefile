# Everything runs in .venv, which the first target that needs it makes.
# PYTHON picks the interpreter that makes it: make test PYTHON=python3.12

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CXX_NAMES := c++ g++ clang++
CODE := fxfreeze passes kernels benchmarks tests
# One test process per core, each with one thread: the threads of two processes would wait for each other. What a file's
# tests share is built once, so a file stays in one process.
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test check lint types bench format clean compiler

help: ## this list; every target makes .venv when it is missing
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo compiler ## train, adapt, freeze and compile a small network, and show what came out
	$(BIN)/fxfreeze demo

test: $(VENV)/.test compiler ## all tests
	$(PYTEST) $(ARGS)

check: lint types $(VENV)/.test compiler ## the inner loop: lint, types, and the tests not marked slow
	$(PYTEST) -m "not slow" $(ARGS)

lint: $(VENV)/.dev ## ruff
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)

format: $(VENV)/.dev ## let ruff sort the imports and lay out the code
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# mypy knows no package-dir mapping, so it is shown the package as it installs, through links.
types: $(VENV)/.dev $(VENV)/.test ## mypy on the package
	@rm -rf build/types && mkdir -p build/types/fxfreeze
	@cd build/types/fxfreeze && ln -s ../../../fxfreeze/* . && ln -s ../../../passes ../../../kernels . && ln -s ../../../benchmarks/harness bench
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml --cache-dir ../../.mypy_cache -p fxfreeze

bench: $(VENV)/.bench compiler ## the benchmarks; ARGS="--help" lists the cases
	$(BIN)/python -m benchmarks $(ARGS)

clean: ## remove what was built; keeps .venv (remove that by hand)
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find $(CODE) -name __pycache__ -type d -prune -exec rm -rf {} +

# One stamp per set of extras, so that nothing is installed again until pyproject.toml changes.
$(VENV)/.demo: EXTRAS := demo,onnx
$(VENV)/.test: EXTRAS := test
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.bench: EXTRAS := bench
$(VENV)/.demo $(VENV)/.test $(VENV)/.dev $(VENV)/.bench: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --editable '.[$(EXTRAS)]'
	@touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	  echo "fxfreeze needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>/dev/null || echo missing)."; \
	  echo "Name another one: make PYTHON=python3.12 ..."; exit 1; } >&2
	@$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
	  echo "'$(PYTHON) -m venv' failed; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }

compiler:
	@for cxx in $$CXX $(CXX_NAMES); do command -v $$cxx >/dev/null 2>&1 && exit 0; done; \
	  echo "No C++ compiler ($(CXX_NAMES), or the one named in CXX): torch compiles its CPU kernels with it." >&2; exit 1
