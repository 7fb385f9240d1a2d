# `make run`: install, collect a small dataset, train for some minutes, say and draw what came out (tools/first_run.py).
# `make test`: install, run all tests.
# Both install into .venv what they need (requirements.txt; make test also requirements-reproduce.txt), and only when
# that has changed since.

PY := .venv/bin/python
PYTHON ?= python3.11
SEEDS ?= 1
PYTEST_ARGS ?=

.PHONY: run test lint
.DELETE_ON_ERROR:

run: .venv/.installed
	@$(PY) tools/first_run.py --seeds $(SEEDS)

test: .venv/.installed .venv/.installed-reproduce
	@echo "test: running pytest $(PYTEST_ARGS)"
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: .venv/.installed
	@echo "lint: running ruff check"
	@$(PY) -m ruff check .

.venv/.installed: requirements.txt
	@echo "install: making .venv and installing requirements.txt into it (minutes, the first time)"
	@for python in $(PYTHON) python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.11 or newer (tried $(PYTHON), python3.11 and python3)" >&2; exit 1; fi; \
	$$found -m venv .venv || { echo "error: $$found -m venv failed (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-reproduce: requirements-reproduce.txt .venv/.installed
	@echo "install: requirements-reproduce.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-reproduce.txt
	@touch $@
