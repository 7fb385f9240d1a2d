# `make run`: install, collect a small dataset, train briefly, draw a figure.  `make test`: install, run all tests.
# Both install into .venv what they need (requirements.txt; make test also requirements-reproduce.txt), and only when
# that has changed since.

PY := .venv/bin/python
PYTHON ?= python3.11
ENV_ID := maze2d-missing-data-umaze-v1
DATASET_ID := ooo/pointmaze/umaze-50k-v0
EXP_NAME := make_run
SEEDS ?= 1 2
# Small networks with larger steps, so that minutes are enough; the bonus must still be alive when the online phase starts.
RUN_ARGS ?= --hidden-dims 128 128 --rnd-hidden-dims 256 256 --learning-rate 1e-3 --tau 0.02 --offline-steps 2000 \
            --online-steps 4000 --retrain-at 4000 --retrain-steps 6000 --eval-every 2000 --eval-episodes 20 \
            --log-every 200 --checkpoint-every 1000
PYTEST_ARGS ?=

.PHONY: run test lint
.DELETE_ON_ERROR:

run: .venv/.installed
	@echo "run: collecting the dataset $(DATASET_ID), 50,000 steps (kept if it exists)"
	@$(PY) tools/collect_pointmaze.py --maze UMaze --steps 50000 --dataset-id $(DATASET_ID)
	@echo "run: training with seeds $(SEEDS) side by side (continued if they were stopped before)"
	@mkdir -p runs
	@for seed in $(SEEDS); do \
	  $(PY) iql_ooo.py --env-id $(ENV_ID) --dataset-id $(DATASET_ID) --exp-name $(EXP_NAME) --resume $(RUN_ARGS) \
	    --seed $$seed > runs/$(EXP_NAME)_$$seed.log 2>&1 & pids="$$pids $$!"; \
	done; \
	for pid in $$pids; do wait $$pid || { tail -n 3 runs/$(EXP_NAME)_*.log >&2; exit 1; }; done
	@tail -q -n 4 $(foreach seed,$(SEEDS),runs/$(EXP_NAME)_$(seed).log)
	@for seed in $(SEEDS); do $(PY) tools/plot_run.py runs/$(ENV_ID)__$(EXP_NAME)__$$seed; done
	@echo "run: next, other seeds (make run SEEDS='3 4'), the medium maze (tools/collect_pointmaze.py --maze Medium," \
	  "--env-id maze2d-missing-data-medium-v1), or README: the paper's tasks and your own data"

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
