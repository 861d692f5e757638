# Every target makes the environment that it needs; nothing has to be installed or activated first.
#   make PYTHON=python3.12 test    uses another interpreter for a new environment

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# The problems are small: sharing them among threads costs time, and very much of it on busy cores.
export OMP_NUM_THREADS ?= 1

.DEFAULT_GOAL := help
.PHONY: help env demo test lint format types results papers benchmarks clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: $(STAMP) ## make .venv with the package and its tools (again when pyproject.toml changes)

# The stamp is written last, so that an install cut short is taken up again.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(STAMP) ## train SGD and DDPNOpt side by side on DIGITS (under two minutes)
	$(BIN)/python -m ocnopt.experiments.demo

test: $(STAMP) ## run the tests
	$(BIN)/python -m pytest $(ARGS)

# Folder that holds a folder per data set; see ocnopt data list.
DATA_ROOT ?= data

results: papers benchmarks ## measure docs/results anew (hours; DATA_ROOT=folder with the data sets)

# Every preconditioner, without and with feedback.
PAIRS := --optimizer sgd --optimizer ddpnopt \
  --optimizer rmsprop --optimizer "ddpnopt preconditioner=rmsprop" \
  --optimizer adam --optimizer "ddpnopt preconditioner=adam" \
  --optimizer ekfac --optimizer "ddpnopt preconditioner=ekfac"

papers: $(STAMP) ## make the paper's tables and figures anew in docs/results (two hours or more)
	$(BIN)/ocnopt reproduce all --output docs/results --data-root $(DATA_ROOT)
	$(BIN)/ocnopt compare --recipe digits-fcn $(PAIRS) --seeds 5 --margin 2 \
	  --output docs/results/compare-digits
	$(BIN)/ocnopt compare --recipe fashion-mnist-fcn $(PAIRS) --seeds 5 --margin 2 \
	  --output docs/results/compare-fashion-mnist --data-root $(DATA_ROOT)

benchmarks: $(STAMP) ## measure defaults, robustness, damping and cost anew (two hours or more)
	$(BIN)/python benchmarks/defaults.py run --data-root $(DATA_ROOT)
	$(BIN)/python benchmarks/robustness.py
	$(BIN)/python benchmarks/damping.py
	$(BIN)/python benchmarks/step_cost.py --page docs/results/cost.md
	$(BIN)/python benchmarks/game_cost.py --page docs/results/game-cost.md
	$(BIN)/python benchmarks/gram_tolerance.py --data-root $(DATA_ROOT)
	$(BIN)/python benchmarks/ode_cost.py --page docs/results/ode-cost.md

lint: $(STAMP) ## check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP) ## rewrite files in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP) ## check types
	$(BIN)/mypy

clean: ## remove the environment, caches and run folders
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist runs
