# Every target sets up what it needs. PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: help setup demo test e2e lint bench lock clean
help:
	@echo "make demo    set up, replay a recorded burst live and the whole hour simulated, report (under five minutes)"
	@echo "make test    set up, run the fast tests"
	@echo "make e2e     real servers: llama.cpp, nginx, a browser"
	@echo "make lint    ruff, mypy"
	@echo "make bench   figures against peers and floors -> build/bench.json"

setup: $(STAMP)

$(STAMP): requirements.lock pyproject.toml
	@echo "== setting up $(VENV)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@sed -n '/^uv==/,/^    # via/p' requirements.lock | grep -v '# via' > $(VENV)/uv.txt
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r $(VENV)/uv.txt
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --require-hashes -r requirements.lock
	@$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $(STAMP)

demo: setup
	@$(BIN)/tidegauge demo

test: setup
	@echo "== the fast tests"
	@$(BIN)/python -m pytest -q -n 2 --dist loadfile

e2e: setup
	@echo "== end to end: real servers"
	@$(BIN)/python -m pytest -q --durations=15 -o addopts="-ra --strict-markers" tests/e2e

lint: setup
	@echo "== lint and types"
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup
	@mkdir -p build
	@$(BIN)/python -m tests.benchmarks

lock: setup
	@$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links \
		--no-header --all-extras pyproject.toml -o requirements.lock

clean:
	rm -rf $(VENV) build runs .mypy_cache .ruff_cache .pytest_cache .hypothesis
