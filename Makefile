# Two commands matter: `make run` and `make test`. Each first sets up .venv, which costs nothing when it is current.

PYTHON ?= python3
VENV := .venv
REQUIREMENTS := pyproject.toml constraints.txt
CSRC := CMakeLists.txt $(wildcard csrc/*)

.PHONY: setup setup-dev build run test check sanitize bench clean

setup: $(VENV)/.stamp-runtime

setup-dev: $(VENV)/.stamp-dev

# The quick way after an edit in csrc/.
build:
	@scripts/install --build

run: setup
	$(VENV)/bin/localmoe serve

test: setup-dev
	@scripts/test

check: setup-dev
	@scripts/check

sanitize: setup-dev
	@scripts/sanitize

bench: setup
	@scripts/bench

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/pip:
	@scripts/check-python $(PYTHON)
	$(PYTHON) -m venv $(VENV)

$(VENV)/.stamp-runtime: $(REQUIREMENTS) $(CSRC) | $(VENV)/bin/pip
	@scripts/install
	@touch $@

# The environment for development holds the one for running.
$(VENV)/.stamp-dev: $(REQUIREMENTS) $(CSRC) | $(VENV)/bin/pip
	@scripts/install --dev
	@touch $(VENV)/.stamp-runtime $@
