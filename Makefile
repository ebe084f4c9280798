# make demo and make test need Python 3.11+ and make, nothing else: each creates .venv when it is not there.
# Written for GNU make 3.81 and later (the one macOS brings).

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
UNFINISHED := $(VENV)/.unfinished
# pytest-xdist fills the cores with processes; several threads in each of them only get in each other's way.
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help env demo test check slow s3 bench notebooks readme

help:
	@echo 'make demo       the whole story on generated data, offline, on a CPU; writes runs/demo/report.html'
	@echo 'make test       the tests (ARGS="tests/losses -x" for some of them)'
	@echo 'make check      ruff and mypy'
	@echo 'make slow       the tests that take long, and those that need a GPU'
	@echo 'make s3         the tests of remote shards against your server: make s3 ENDPOINT=https://...'
	@echo 'make bench      the benchmarks that need no data (BENCH=recall ARGS=--json: one of them, one object a line)'
	@echo 'make notebooks  writes notebooks/*.ipynb from their .py sources'
	@echo 'make readme     writes the README'"'"'s table of methods'
	@echo 'make encoder    trains the encoder of tests/data/encoder, or finds it in the cache ($$VLKIT_DATA; 45 minutes)'
	@echo 'make env        only installs (PYTHON=python3.12 chooses the interpreter)'

env: $(INSTALLED)

# An installation that was broken off leaves $(UNFINISHED) behind; then everything is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "vlkit needs Python 3.11 or later; $(PYTHON) is: $$($(PYTHON) --version 2>&1)." >&2; \
	    echo "Install one and name it: make env PYTHON=python3.12" >&2; exit 1; }
	@if [ -e $(UNFINISHED) ] || ! $(BIN)/python -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then \
	    echo "Creating $(VENV) with $$($(PYTHON) --version)"; \
	    $(PYTHON) -m venv --clear $(VENV) || { \
	        rm -rf $(VENV); \
	        echo "$(PYTHON) cannot create virtual environments (Debian, Ubuntu: install python3-venv)." >&2; exit 1; }; \
	fi
	@touch $(UNFINISHED)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(BIN)/uv pip install --python $(BIN)/python --quiet --constraints constraints.txt \
	    --build-constraints constraints.txt --editable '.[dev]'
	@rm -f $(UNFINISHED)
	@touch $@

demo: env
	$(BIN)/vlkit demo

test: env
	$(PYTEST) $(ARGS)

# Both run, so that one report shows everything.
check: env
	@status=0; $(BIN)/ruff check . || status=1; $(BIN)/mypy --strict vlkit data_tools eval || status=1; exit $$status

slow: env
	$(PYTEST) -m '(slow or gpu) and not network and not peers' $(ARGS)

# The address of any S3 server; see the head of the test for the variables with bucket, key and secret.
s3: env
	@test -n "$(ENDPOINT)" || { echo "make s3 ENDPOINT=https://... (or http://127.0.0.1:9000)" >&2; exit 1; }
	VLKIT_S3_ENDPOINT="$(ENDPOINT)" $(PYTEST) -m 'slow or not slow' tests/data/test_remote_s3.py $(ARGS)

# Those that need no data; the others in tests/benchmarks say with --help what they want.
BENCH ?= contrastive_loss loader patch_alignment prompt_steps recall train_step

bench: env
	@for name in $(BENCH); do \
	    echo "== $$name"; $(BIN)/python "tests/benchmarks/$$name.py" $(ARGS) || exit 1; \
	done

notebooks: env
	$(BIN)/jupytext --to ipynb notebooks/*.py

readme: env
	$(BIN)/python tests/test_readme.py

encoder: env
	$(BIN)/python tests/data/make_encoder.py
