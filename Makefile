# `make run`: install, collect a small dataset, train briefly, draw a figure.  `make test`: install, run all tests.
# Both install into .venv what they need (requirements.txt; make test also requirements-reproduce.txt), and only when
# that has changed since.

PY := .venv/bin/python
ENV_ID := maze2d-missing-data-large-v1
DATASET_ID := ooo/pointmaze/large-v0
EXP_NAME := make_run
# 1/100 of the paper's budgets, one retraining, few evaluations: minutes on two cores.
RUN_ARGS ?= --scale 0.01 --retrain-at 500000 --retrain-steps 1000000 --eval-every 250000 --eval-episodes 10 \
            --log-every 20000 --checkpoint-every 100000 --torch-threads 2
PYTEST_ARGS ?=

.PHONY: run test lint
.DELETE_ON_ERROR:

run: .venv/.installed
	@echo "run: collecting the dataset $(DATASET_ID), about a minute (kept if it exists)"
	@$(PY) tools/collect_pointmaze.py --dataset-id $(DATASET_ID)
	@echo "run: training on $(ENV_ID) (continued if it was stopped before)"
	$(PY) iql_ooo.py --env-id $(ENV_ID) --dataset-id $(DATASET_ID) --exp-name $(EXP_NAME) --resume $(RUN_ARGS)
	@echo "run: drawing runs/$(ENV_ID)__$(EXP_NAME)__1/figure.png"
	@$(PY) tools/plot_run.py runs/$(ENV_ID)__$(EXP_NAME)__1

test: .venv/.installed .venv/.installed-reproduce
	@echo "test: running pytest $(PYTEST_ARGS)"
	@$(PY) -m pytest $(PYTEST_ARGS)

lint: .venv/.installed
	@echo "lint: running ruff check"
	@$(PY) -m ruff check .

.venv/.installed: requirements.txt
	@echo "install: making .venv and installing requirements.txt into it (minutes, the first time)"
	@for python in python3.11 python3; do \
	  if $$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then found=$$python; break; fi; \
	done; \
	if [ -z "$$found" ]; then echo "error: no Python 3.11 or newer (tried python3.11 and python3)" >&2; exit 1; fi; \
	$$found -m venv .venv || { echo "error: $$found -m venv failed (Debian: apt install python3-venv)" >&2; exit 1; }
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/.installed-reproduce: requirements-reproduce.txt .venv/.installed
	@echo "install: requirements-reproduce.txt"
	@$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt -r requirements-reproduce.txt
	@touch $@
