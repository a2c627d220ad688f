# `make demo` and `make test` are all a fresh machine needs: they make .venv and install into it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
STAMP := $(VENV)/.installed
# Two workers with one thread each beat one worker with two threads on the small tensors of the tests. In the order of
# their names the files with the longest tests come first, so that no worker is left with one at the end.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20

.PHONY: help demo test near faults nightly mutants check format docs bench gpu evidence clean
help:
	@echo "make demo    train the digits at scales 1 to 128 and write anybatch-demo/report.html"
	@echo "make test    the whole test suite"
	@echo "make near FILE=src/anybatch/_scaling/clock.py   the tests that know one file of the core"
	@echo "make faults  the long form of tests/faults: a hundred killed runs, 26,000 damaged files; 20 minutes"
	@echo "make nightly the whole suite with many more cases of each kind; hours"
	@echo "make mutants   a hundred changes of the core, one at a time, that the tests must notice; an hour, and goes on"
	@echo "make check   lint, types and import levels"
	@echo "make docs    the documentation's site, into site/; strict, and nothing from the network"
	@echo "make bench   the benchmarks, each with its table"
	@echo "make gpu     the costs on a GPU, by a PYTHON whose torch finds one; eight minutes"
	@echo "make evidence   every rule against scale 1 on all tasks: hours, and goes on where it was stopped"

# torch is installed from the constraints first: an unpinned torch would bring gigabytes of CUDA.
$(DEMO): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[demo]'
	@touch $(DEMO)

$(STAMP): $(DEMO)
	$(BIN)/pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $(STAMP)

demo: $(DEMO)
	$(BIN)/anybatch demo

test: $(STAMP)
	$(TEST)

near: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/near.py $(FILE)

faults: $(STAMP)
	CASES=long $(TEST) tests/faults

nightly: $(STAMP)
	CASES=long $(TEST)

mutants: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/mutation/mutants.py

check: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@found=$$(PATH="$(CURDIR)/$(BIN):$$PATH" basedpyright --verifytypes anybatch --ignoreexternal) \
		|| { echo "$$found"; exit 1; }  # every public symbol has a type that all checkers agree on
	$(BIN)/pip check --disable-pip-version-check
	$(BIN)/python -m pytest -q tests/test_imports.py

format: $(STAMP)
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(STAMP)
	$(BIN)/mkdocs build --quiet
	$(BIN)/python -m pytest -q tests/test_site.py

bench: $(STAMP)
	$(BIN)/python -m benchmarks.overhead
	$(BIN)/python -m benchmarks.overhead_profile
	$(BIN)/python -m benchmarks.every
	$(BIN)/python -m benchmarks.per_layer
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.rare_rows
	$(BIN)/python -m benchmarks.smoothing
	$(BIN)/python -m benchmarks.decays
	$(BIN)/python -m benchmarks.ema
	$(BIN)/python -m benchmarks.record
	$(BIN)/python -m benchmarks.forecast
	$(BIN)/python -m benchmarks.forecast_band
	$(BIN)/python -m benchmarks.beyond
	$(BIN)/python -m benchmarks.trainer_gpt --json docs/frameworks/gpt.json
	$(BIN)/python -m benchmarks.language --json docs/language/results.json
	$(BIN)/python -m benchmarks.idea
	$(BIN)/python -m benchmarks.first_screen
	$(BIN)/python -m benchmarks.examples

# Without .venv, whose torch is the one for CPUs.
gpu:
	PYTHONPATH=src $(PYTHON) -m benchmarks.gpu --json docs/overhead/gpu.json

evidence: $(STAMP)
	$(BIN)/python -m benchmarks.same_training --json docs/same-training/results.json --figure docs/same-training/frontier.png
	$(BIN)/python -m benchmarks.instead

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache anybatch-demo site
