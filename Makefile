# Everything here can be run again at any time: what is already done takes no time.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

VENV := .venv
PY := $(VENV)/bin/python
UV_VERSION := 0.13.8
PYTEST_ARGS ?=

# A stamp bears the hash of all that decides what is installed, the place of the tree included
# (a virtual environment knows its own path): when one of these changes, so does the stamp's name.
hash = $(shell { echo "$(CURDIR) $(UV_VERSION)"; cat pyproject.toml $(1); } | sha256sum | cut -c1-16)
INSTALLED := $(VENV)/installed-$(call hash,requirements/runtime.lock)
DEVELOP := $(VENV)/develop-$(call hash,requirements/runtime.lock requirements/dev.lock)

# Where the environment itself has to be made anew, its stamps say nothing any more.
USABLE := $(shell [[ "$$(cat $(VENV)/made-in 2>/dev/null || pwd)" == "$(CURDIR)" ]] && $(PY) -c 'import pip' 2>/dev/null \
	&& echo yes || rm -rf $(VENV)/installed-* $(VENV)/develop-*)

# uv is quick; pip knows mirrors and certificates that are configured for pip alone.
define pip_install
	$(PY) -m uv pip install --quiet --python $(PY) $(1) \
	|| { echo "uv could not install this; trying pip"; $(PY) -m pip install --quiet $(1); }
endef

.PHONY: help
help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-9s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

.PHONY: install
install: $(INSTALLED) ## set up all that Carrel needs; the command is .venv/bin/carrel

.PHONY: demo
demo: install ## show a whole session with a scripted model, then end
	$(VENV)/bin/carrel demo --once

.PHONY: test
test: $(DEVELOP) ## run every test
	$(PY) -m pytest -n 2 --dist worksteal $(PYTEST_ARGS)

.PHONY: check
check: $(DEVELOP) ## lint, format, types, import rule, quick unit tests: under a minute
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(PY) scripts/check_import_rules.py
	$(PY) -m uv pip check --quiet --python $(PY) # fails where pyproject.toml has gone ahead of the locks
	$(PY) -m pytest -q -n 2 --dist worksteal -m "not slow" tests/unit $(PYTEST_ARGS)

.PHONY: bench
bench: $(DEVELOP) ## measure, each figure beside the bare SDK
	$(PY) -m benchmarks

.PHONY: soak
soak: $(DEVELOP) ## run for a long time and watch what grows
	$(PY) -m benchmarks.soak
	$(PY) -m pytest -v tests/kill -m soak $(PYTEST_ARGS)

.PHONY: soak-compose
soak-compose: $(DEVELOP) ## bring up every compose mode, use it, stop it, bring it up again (scripts/testbed comes first)
	docker build --quiet --tag carrel-stand-in-postgres tests/compose/stand-ins/postgres
	docker build --quiet --tag carrel-stand-in-objects tests/compose/stand-ins/objects
	$(PY) -m pytest -v tests/compose -m "slow_compose or not slow_compose" $(PYTEST_ARGS)

.PHONY: lock
lock: $(DEVELOP) ## make the lock files anew (LOCK_ARGS=--upgrade takes newer versions)
	scripts/lock $(LOCK_ARGS)

.PHONY: clean
clean: ## remove what was made here, the virtual environment included
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -not -path './node_modules/*' -prune -exec rm -rf {} +

.PHONY: system-packages
system-packages:
	@scripts/install-system-packages

# One virtual environment, made anew when its interpreter is gone or the tree has moved.
.PHONY: venv
venv: | system-packages
	@if [[ -z "$(USABLE)" ]]; then \
		python=; \
		for candidate in $(PYTHON) python3 python3.14 python3.13 python3.12 python3.11; do \
			if "$$candidate" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
			then python=$$candidate; break; fi; \
		done; \
		if [[ -z "$$python" ]]; then \
			echo "Carrel needs Python 3.11 or newer with its venv module, and none was found."; \
			echo "On Debian or Ubuntu: apt-get install python3-venv. Elsewhere: make PYTHON=/path/to/python3.11 install"; \
			exit 1; \
		fi >&2; \
		echo "making $(VENV) with $$("$$python" --version)"; \
		"$$python" -m venv --clear $(VENV); \
		echo "$(CURDIR)" > $(VENV)/made-in; \
	fi
	@if [[ "$$($(PY) -m uv --version 2>/dev/null)" != "uv $(UV_VERSION)"* ]]; then \
		$(PY) -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION); \
	fi

$(INSTALLED): | venv
	@echo "installing Carrel"
	@$(call pip_install,--compile --require-hashes -r requirements/runtime.lock)
	@$(call pip_install,--no-deps -e .)
	@rm -f $(VENV)/installed-*; touch $@

$(DEVELOP): | $(INSTALLED)
	@echo "installing what tests and checks need"
	@$(call pip_install,--compile --require-hashes -r requirements/dev.lock)
	@rm -f $(VENV)/develop-*; touch $@
