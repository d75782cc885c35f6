# Two commands matter: `make run` and `make test`. Each first sets up .venv, which costs nothing when it is current.

PYTHON ?= python3
VENV := .venv
REQUIREMENTS := pyproject.toml constraints.txt
INSTALL := $(VENV)/bin/pip install --disable-pip-version-check --constraint constraints.txt --editable

.PHONY: setup setup-dev run test check bench clean

setup: $(VENV)/.stamp-runtime

setup-dev: setup $(VENV)/.stamp-dev

run: setup
	$(VENV)/bin/localmoe serve

test: setup-dev
	@scripts/test

check: setup-dev
	@scripts/check

bench: setup
	@scripts/bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@scripts/check-python $(PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-runtime: $(REQUIREMENTS) | $(VENV)/bin/pip
	$(INSTALL) .
	@touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-runtime
	$(INSTALL) '.[dev]'
	@touch $@
