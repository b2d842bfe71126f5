# kvmmm: `make run` sets everything up and boots the demo guest; `make test` sets up and tests.
#
# Everything lives in .venv and build/; `make clean` removes both. PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check
# Bytecode is made when a module is first imported: most of what is installed never is.
PIP_INSTALL := $(PIP) install --no-compile
BUILD_TOOLS := 'scikit-build-core>=1.1' 'cffi>=2.1' 'cmake>=3.20' 'ninja>=1.11'
ARGS ?=
TESTS ?= tests
# The quick selection is `make test-npt NPT_TESTS="-m npt"`.
NPT_TESTS ?= -m kvm
NPT_TIMEOUT ?= 3600

NATIVE := $(wildcard kvmmm/_native/*) $(shell find guest -type f 2>/dev/null)

.PHONY: run test test-long test-npt fuzz lint format bench picture guests doctor wheel clean help

run: $(VENV)/built  ## boot the demo guest: its console, then its demand paging
	@$(BIN)/kvmmm run touch --stats $(ARGS)

test: $(VENV)/tests  ## run the tests (KVMMM_TEST_KVM=auto|require|never, TESTS=path, ARGS=...)
	$(BIN)/python -m pytest $(TESTS) $(ARGS)

test-long: $(VENV)/tests  ## a million random steps against the model; goes on where it was stopped
	KVMMM_TEST_LONG=1 $(BIN)/python -m pytest tests/bench/crossover/test_statistics.py -q
	$(BIN)/python -m tests.model.long --steps 1000000 --minutes 60 --state build/test-long.json $(ARGS)

test-npt: $(VENV)/tests  ## run the KVM tests on mainline KVM with nested paging, inside QEMU TCG
	@if why=$$($(BIN)/python tools/npt check 2>&1); then \
	    $(BIN)/python tools/npt build && \
	    $(BIN)/python tools/npt run --timeout $(NPT_TIMEOUT) -- $(NPT_TESTS) $(ARGS); \
	else \
	    printf 'test-npt: SKIPPED\n%s\n' "$$why"; \
	fi

fuzz: $(VENV)/built  ## hostile calls of copies in C, for an hour (ARGS="--minutes 5 --seed 1")
	$(BIN)/python -m tools.fuzz $(ARGS)

lint: $(VENV)/lint  ## ruff, mypy --strict, the import contracts, spelling
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/lint  ## have ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/bench  ## measure: ARGS="--quick", BENCH=startup|exits|paging|mm|copies|all
	$(BIN)/kvmmm bench $(or $(BENCH),all) $(ARGS)

picture: $(VENV)/crossover  ## measure where ASIO wins here, then README's picture and answer
	$(BIN)/kvmmm bench crossover --out build/crossover --resume $(ARGS)
	$(BIN)/python -m tools.picture build/crossover

guests: $(VENV)/built  ## build and list the bundled guests
	@$(BIN)/kvmmm guests

doctor: $(VENV)/built  ## say what this host's KVM can do
	@$(BIN)/kvmmm doctor $(ARGS)

wheel: $(VENV)/venv  ## build a wheel into dist/
	$(BIN)/python -m pip --disable-pip-version-check wheel --no-deps --wheel-dir dist .

clean:  ## remove the virtual environment and everything built
	rm -rf $(VENV) build dist .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 12

# ---- what the verbs stand on; each file is a time stamp ----

$(VENV)/venv:
	@$(PYTHON) tools/preflight.py
	@echo 'kvmmm: making .venv'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP_INSTALL) --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/tools: $(VENV)/venv
	@$(PIP_INSTALL) $(BUILD_TOOLS)
	@touch $@

$(VENV)/built: $(VENV)/tools pyproject.toml $(NATIVE)
	@echo 'kvmmm: building the core and the guests'
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(PIP_INSTALL) --no-build-isolation --editable .
	@touch $@

$(VENV)/tests: $(VENV)/built
	@$(PIP_INSTALL) --group test --group whole || { \
	    echo 'kvmmm: not all peers of the tests can be installed: some tests are skipped'; \
	    $(PIP_INSTALL) --group test; }
	@touch $@

$(VENV)/crossover: $(VENV)/built
	@$(PIP_INSTALL) 'kvmmm[crossover]'
	@touch $@

$(VENV)/bench: $(VENV)/built
	@$(PIP_INSTALL) --group bench || echo 'kvmmm: no unicorn to compare with: one case is skipped'
	@touch $@

$(VENV)/lint: $(VENV)/tests
	@$(PIP_INSTALL) --group lint --group types
	@touch $@
