# make quickstart   from nothing to a trained network and its report (runs/quickstart/report.html)
# make test         the whole test suite
# make check        lint, types, layers, wheel contents (what CI runs before the tests)
# Both make their own environment in .venv and reuse it. A torch >= 2.11 that python3 already has
# (a module, a container) is kept; otherwise the pinned version comes from pip's configured index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: quickstart test check clean

quickstart: $(VENV)/.ready
	$(BIN)/dmi launch all recipes/homogenization_quickstart.toml --out runs/quickstart

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) build dist

# The environment itself. Debian without python3-venv: the system's pip fills it from outside.
$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12" >&2; exit 2; }
	@site=$$($(PYTHON) -c 'import torch; from packaging.version import Version as V; print("--system-site-packages" if V(torch.__version__) >= V("2.11") else "")' 2>/dev/null); \
	  $(PYTHON) -m venv $$site $(VENV) >/dev/null 2>&1 || \
	  { rm -rf $(VENV); $(PYTHON) -m venv $$site --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } || \
	  { rm -rf $(VENV); echo "error: cannot make an environment; install python3-venv (or python3-pip)" >&2; exit 2; }; \
	  if [ -n "$$site" ]; then grep -v '^torch==' constraints.txt; else cat constraints.txt; fi > $(VENV)/constraints.txt
	@touch $@

# torch first: deepspeed looks for it while it is built
define install
	@echo "installing $(1) into $(VENV) (the first time takes minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '$(1)'
	@touch $@
endef

$(VENV)/.ready: $(VENV)/.made pyproject.toml constraints.txt
	$(call install,.)

$(VENV)/.ready-test: $(VENV)/.ready
	$(call install,.[test])

$(VENV)/.ready-dev: $(VENV)/.ready-test
	$(call install,.[dev])
