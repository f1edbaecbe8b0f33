# latentrl: `make demo` shows everything, `make test` proves it. Both make .venv themselves.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLUSTER_STAMP := $(VENV)/.installed-cluster

.PHONY: setup demo test test-cluster fuzz check format bench claims clean

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) is not there; install Python 3.11 or say make PYTHON=..."; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,bench]'
	@touch $(STAMP)
	@echo "installed; next: make demo"

demo: setup
	$(BIN)/latentrl demo --overwrite

test: setup check
	@sh tests/need_chromium.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests

test-cluster: $(CLUSTER_STAMP)
	@sh tests/cluster/need_services.sh
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --durations=20 $(if $(SHORT),-m 'not long') tests/cluster

fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzzing.py --inputs $(or $(INPUTS),10000)

$(CLUSTER_STAMP): $(STAMP)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,bench,cluster]'
	@touch $(CLUSTER_STAMP)

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest tests/test_layering.py

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: setup
	$(BIN)/python benchmarks/collect.py
	$(BIN)/python benchmarks/pretrain.py
	$(BIN)/python benchmarks/replay.py
	$(BIN)/python benchmarks/q_learning.py --short

claims: setup
	PYTHONPATH=benchmarks $(BIN)/python -m claims $(if $(SHORT),--short,--write docs/results)

clean:
	rm -rf $(VENV) latentrl-runs latentrl-demo .mypy_cache .ruff_cache .hypothesis .fuzz *.egg-info
