# Two commands for everybody: `make demo` and `make test`. Both set up a virtual environment first, if need be.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
EXTRAS ?= test,quality,docs
TESTS ?=
BIN = $(VENV)/bin
PIP = $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint $(CONSTRAINTS)
# What calls the libraries whose versions differ from user to user.
CORE = adapters backbone_loading bank card class_routers cli combine download every_method experts heads hub_answers \
	images learn model naming own_methods prefix push reader routing scoring storage streams training trunk
export PYTHONUNBUFFERED = 1

.PHONY: help demo test test-upstream test-lowest quality style docs

help:  ## show this text
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' Makefile

$(VENV)/installed: pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable ".[$(EXTRAS)]"
	@touch $@

demo: $(VENV)/installed  ## learn five tasks of handwritten digits one after another, offline, in about two minutes
	$(BIN)/python recipes/demo.py --output_dir out/demo --overwrite_output_dir

test: $(VENV)/installed  ## run the tests, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder $(TESTS)

test-upstream:  ## run the tests on the newest versions there are
	$(MAKE) test VENV=.venv-upstream CONSTRAINTS=/dev/null EXTRAS=test

test-lowest:  ## run the core tests on the lowest versions that are supported
	$(MAKE) test VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt EXTRAS=test TESTS="$(CORE:%=tests/test_%.py)"

quality: $(VENV)/installed  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

style: $(VENV)/installed  ## mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed  ## build the pages into build/site, strictly: links, headings and docstrings are checked
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict
