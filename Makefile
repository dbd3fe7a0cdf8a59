# `make train` and `make test` do all their set-up in .venv themselves; see tools/setup_venv.sh.
# Variables: ARGS is passed on (make train ARGS="--set seed=1 --set run=runs/seed-1"); PYTHON
# chooses the interpreter that .venv is made with; CONFIG is what `make train` runs.
CONFIG ?= examples/smollm2-cpu.yaml
ARGS ?=
PYTHON ?=
BIN := .venv/bin
# The example's own run folder may be replaced by typing `make train` again; a run of yours may not.
OVERWRITE = $(if $(filter examples/smollm2-cpu.yaml$(ARGS),$(CONFIG)),--overwrite)

# Packages on these paths would shadow those of .venv.
unexport PYTHONPATH PYTHONHOME

.PHONY: help venv train test bench lint format clean

help:
	@echo "make train   train SmolLM2-135M with RECAP, evaluate before and after, write a report;"
	@echo "             replaces the run of the last time"
	@echo "make test    run the test suite but for its slow tests (ARGS: pytest's, -m slow for those)"
	@echo "make bench   run the benchmarks"
	@echo "make lint    check style and types"
	@echo "make format  apply the style"
	@echo "make clean   remove caches and build products (not .venv, not runs)"

venv:
	@PYTHON="$(PYTHON)" tools/setup_venv.sh

train: venv
	$(BIN)/recap-fast train $(CONFIG) $(OVERWRITE) $(ARGS)

# Three processes of one thread each on two cores, since tests also wait, for processes and for
# deadlines; a file's tests stay together, with their models and engines. What ARGS selects runs in
# one process.
test: venv
	$(if $(ARGS),,OMP_NUM_THREADS=1) $(BIN)/python -m pytest -m "not slow" $(or $(ARGS),-n 3 --dist loadfile)

bench: venv
	$(BIN)/recap-fast bench $(ARGS)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
