# Everything runs in .venv, which is built from the lock on first use.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete

# Python 3.11 is the tested version; `make PYTHON=... <target>` picks another one.
PYTHON ?= $(shell for p in python3.11 python3; do \
	if $$p -c "" 2>/dev/null; then echo $$p; break; fi; done)

export TF_CPP_MIN_LOG_LEVEL ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow fuzz docs lint bench format clean

help:
	@echo "make demo         train 2-bit networks on real digits and print a table"
	@echo "make test         run the tests of the library"
	@echo "make test-slow    run the others: programs, several processes, long trainings"
	@echo "make fuzz         200 random networks through training, files and their proof"
	@echo "make docs         write the pages of docs/ to docs/_build"
	@echo "make lint         check style, format and types"
	@echo "make bench        list the benchmarks; NAME=<one> ARGS='...' runs it"
	@echo "make format       rewrite the sources in the checked format"
	@echo "make clean        remove .venv, caches and build output"

# The stamp is written last: an interrupted build leaves none and is started over.
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c "import sys; ok = (3, 11) <= sys.version_info[:2] <= (3, 13); \
	  sys.exit(None if ok else 'Python 3.11 to 3.13 is needed (3.11 is tested). ' \
	  'Received: ' + sys.version.split()[0] + '. Try: make PYTHON=python3.11')"
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -qq -r requirements.lock
	$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py

# A worker takes up to 6 GB; a file's tests stay together, for they share networks.
# In the order of the files: by their number of tests, long files of one come last.
WORKERS ?= 2
PYTEST := -m pytest --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder
# A worker for each core, so one thread for each worker.
test: export TF_NUM_INTRAOP_THREADS ?= 1
test: $(STAMP)
	$(BIN)/python $(PYTEST) -m "not slow" tests

# With the number of threads that users have.
test-slow: $(STAMP)
	$(BIN)/python $(PYTEST) -m slow tests

# The tests take 20, always the same; here they are others each time.
COUNT ?= 200
fuzz: $(STAMP)
	TF_LOWBIT_FUZZ=$(COUNT) $(BIN)/python -m pytest -s tests/fuzz

docs: $(STAMP)
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

ifdef NAME
bench: $(STAMP)
	$(BIN)/python -m benchmarks.$(NAME) $(ARGS)
else
bench:
	@for f in $$(grep -lr 'app\.run(main)' benchmarks --include='*.py' | sort); do \
	  name=$$(echo "$${f%.py}" | sed 's|^benchmarks/||; s|/__main__$$||; s|/|.|g'); \
	  printf 'make bench NAME=%-20s %s\n' "$$name" \
	    "$$(sed -n '1s/^[rR]*"""//;1s/"""$$//;1p' "$$f")"; \
	done
endif

clean:
	rm -rf $(VENV) docs/_build build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
