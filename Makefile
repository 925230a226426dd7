# Every target makes the environment it needs, once. Only Python 3.11 or newer and make are taken for granted.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Images of containers often set this, and then every process compiles torch and diffusers again: 10 s instead of 4.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: quickstart test check bench install clean

quickstart: install  ## a real sweep on real data with a report, on a CPU, in minutes
	$(BIN)/repa-lab sweep experiments/quickstart.yaml

test: install  ## the default tests
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not bench"

check: install  ## what a change must pass: lint, types, tests
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

bench: install  ## ratios, side by side in one run
	$(BIN)/python -m pytest -s -m bench tests/benchmarks

install: $(READY)  ## the environment

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "repa-lab needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --constraint constraints.txt --editable ".[dev]"
	touch $(READY)

clean:  ## remove the environment; runs are kept
	rm -rf $(VENV)
