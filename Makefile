# Two commands for everybody: `make demo` and `make test`. Both set up a virtual environment first, if need be.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
export PYTHONUNBUFFERED = 1

.PHONY: help demo test quality style

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' Makefile

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[test,quality]"
	@touch $@

demo: $(VENV)/installed  ## learn five tasks of handwritten digits one after another, offline, in about two minutes
	$(BIN)/python recipes/demo.py --output_dir out/demo --overwrite_output_dir

test: $(VENV)/installed  ## run the tests, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile

quality: $(VENV)/installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
