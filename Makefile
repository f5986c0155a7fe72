# `make up` runs Nimbos; `make test` tests it. Both set themselves up; the environment is .venv.
PYTHON ?= python3
BIN := .venv/bin
ARGS ?=
# Tests wait more than they compute: a worker more than there are cores (tests/conftest.py). A file stays in one, and
# they begin in the order of collection.
PARALLEL ?= -n auto --dist loadfile --no-loadscope-reorder

.PHONY: up test test-postgresql test-long lint types check clean

.venv/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) must be Python 3.11 or newer; another one: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -m venv .venv || \
		{ echo "No virtual environment could be made. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e .
	@touch $@

.venv/.installed-dev: .venv/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $@

up: .venv/.installed
	@$(BIN)/nimbos engine install --if-possible
	@$(BIN)/nimbos up $(ARGS)

test: .venv/.installed-dev
	$(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

# The same tests, with PostgreSQL behind every server that they start.
test-postgresql: .venv/.installed-dev
	NIMBOS_TEST_DATABASE=postgresql $(BIN)/python -m pytest -q $(PARALLEL) $(ARGS)

test-long: .venv/.installed-dev
	$(BIN)/python -m pytest -q -m long --timeout 1800 $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: .venv/.installed-dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv
