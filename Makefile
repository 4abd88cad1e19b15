# Everything runs inside .venv, which the first call makes and later calls reuse.
PYTHON ?= python3
BIN := .venv/bin
# uv installs the same wheels several times faster than pip; pip is the way out where uv cannot run.
INSTALL = $(BIN)/python -m uv pip install --quiet --python $(BIN)/python $(1) || $(BIN)/python -m pip install --quiet $(1)

# Hashes of every file of every release, for each platform; --python-version is the oldest that pyproject.toml allows.
LOCK = $(BIN)/python -m uv pip compile --quiet --upgrade --universal --python-version 3.11.4 --generate-hashes \
  --custom-compile-command "make lock"

.PHONY: help demo test lint types tests lock notebooks clean

help:
	@echo "make demo    install, then train a small network on real digits, plain and slim, and compare them"
	@echo "make test    install, lint, type-check and test"
	@echo "make lint | types | tests    one part of 'make test'"
	@echo "make notebooks    run the notebooks, and store them with their figures (minutes)"
	@echo "make lock    look up the newest releases, and pin them with their hashes in requirements*.lock"
	@echo "make clean   remove .venv and everything that runs wrote"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 4))' || \
	  { echo "slimconv_lit needs Python 3.11.4 or newer; '$(PYTHON)' is older. Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install --quiet uv || echo "uv is not to be had; going on with pip"

.venv/installed: .venv/bin/python requirements.txt pyproject.toml
	@echo "installing requirements.txt (several GB, once)"
	@$(call INSTALL,-e .)
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing the development tools"
	@$(call INSTALL,-e ".[dev]")
	@touch $@

demo: .venv/installed
	@$(BIN)/python -m slimconv_lit compare --config quickstart.yaml

test: lint types tests

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed-dev
	$(BIN)/mypy

tests: .venv/installed-dev
	$(BIN)/python -m pytest -n 2

lock: .venv/bin/python
	$(LOCK) requirements.txt -o requirements.lock
	$(LOCK) pyproject.toml --extra dev -c requirements.lock -o requirements-dev.lock

notebooks: .venv/installed-dev
	@$(BIN)/python notebooks/run.py

clean:
	rm -rf .venv runs
