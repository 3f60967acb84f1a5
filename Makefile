# One door. `make` alone prints this list; .ci/run calls the same targets.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
LISTEN ?= 127.0.0.1:5000
STORAGE ?= var/registry
MINUTES ?= 30
# The object store of test-s3; the folder is named after its version.
VERSITYGW := .cache/s3/versitygw-v1.8.0/versitygw

.DEFAULT_GOAL := help
.PHONY: help init run check fix test test-slow test-s3 test-replicas soak test-all conformance bench demo clean

help: ## print this list
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.run: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11 …") if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@

init: $(VENV)/.dev ## set up the local environment

run: $(VENV)/.run ## start the registry on a folder at 127.0.0.1:5000
	@$(BIN)/modelkit-registry serve --hints --listen $(LISTEN) --storage $(STORAGE)

check: $(VENV)/.dev ## lint, types, architecture; changes nothing
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

fix: $(VENV)/.dev ## what the linter and the formatter can mend
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

test: $(VENV)/.dev ## the fast suite
	$(BIN)/pytest -n auto -m 'not slow and not s3'

test-slow: $(VENV)/.dev ## the sweeps: every point to be killed at, power cuts on a loop device
	$(BIN)/pytest -n auto -m slow

$(VERSITYGW):
	CGO_ENABLED=0 GOBIN=$(abspath $(@D)) go install github.com/versity/versitygw/cmd/versitygw@v1.8.0

test-s3: $(VENV)/.dev $(VERSITYGW) ## the S3 backend on a real object store, which it builds
	VERSITYGW=$(abspath $(VERSITYGW)) $(BIN)/pytest -n auto -m s3

test-replicas: $(VENV)/.dev $(VERSITYGW) ## for long: 500 pushes with kills, 10,000 operations on tags, a faulty store, requests beside Distribution's
	VERSITYGW=$(abspath $(VERSITYGW)) SCHEDULES=500 OPERATIONS=10000 SEEDS=50 COMPARE=1 \
		$(BIN)/pytest -m s3 tests/replicas tests/registry/test_faulty_store.py

soak: $(VENV)/.dev $(VERSITYGW) ## 30 minutes of everything at once on three replicas, while they collect; MINUTES=n
	VERSITYGW=$(abspath $(VERSITYGW)) $(BIN)/python -m tests.replicas.soak --minutes $(MINUTES)

test-all: test test-slow test-s3 ## the fast suite, the sweeps and S3

conformance: $(VENV)/.dev ## others' suites and clients against us; installs what they need; PARTS="official views"
	$(BIN)/python -m conformance $(PARTS:%=--only %)

bench: $(VENV)/.dev ## speed beside a peer, on a folder and on S3, as ratios
	$(BIN)/python -m bench $(BENCH)

demo: $(VENV)/.run ## a real model: pack, push, list, unpack only the model
	$(BIN)/python deploy/demo.py $(if $(REGISTRY),--registry $(REGISTRY))

clean: ## remove what the targets made
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .cache
