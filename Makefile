# make quickstart   from nothing to a trained network and its report (runs/quickstart/report.html)
# make test         the whole test suite
# make check        lint, types, layers, wheel contents (what CI runs before the tests)
# Both make their own environment in .venv and reuse it. A torch >= 2.11 that python3 already has
# (a module, a container) is kept; otherwise the pinned version comes from pip's configured index.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test check clean

quickstart: $(VENV)/.ready
	$(BIN)/dmi launch all recipes/homogenization_quickstart.toml --out runs/quickstart

test: $(VENV)/.ready-test
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder

check: $(VENV)/.ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tests/check_wheel.py

clean:
	rm -rf $(VENV) build dist

# The environment itself. It sees the packages of $(PYTHON) only if a suitable torch is among them.
# Debian without python3-venv: the system's pip fills it from outside.
HAS_TORCH = -c 'import sys, torch; sys.exit(tuple(map(int, torch.__version__.split(".")[:2])) < (2, 11))' 2>/dev/null

$(VENV)/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: $(PYTHON) is older than 3.11; choose another: make PYTHON=python3.12" >&2; exit 2; }
	@site=; if $(PYTHON) $(HAS_TORCH); then site=--system-site-packages; fi; \
	  $(PYTHON) -m venv $$site $(VENV) >/dev/null 2>&1 || \
	  { rm -rf $(VENV); $(PYTHON) -m venv $$site --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install -q pip; } || \
	  { rm -rf $(VENV); echo "error: cannot make an environment; install python3-venv (or python3-pip)" >&2; exit 2; }
	@touch $@

$(VENV)/constraints.txt: $(VENV)/.made constraints.txt
	@if [ -e $(VENV)/.own-torch ] || ! $(BIN)/python $(HAS_TORCH); \
	  then touch $(VENV)/.own-torch; cat constraints.txt; else grep -v '^torch==' constraints.txt; fi > $@

# torch first: deepspeed looks for it while it is built
define install
	@echo "installing $(1) into $(VENV) (the first time takes minutes)"
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt torch
	@$(BIN)/python -m pip install -q --disable-pip-version-check -c $(VENV)/constraints.txt -e '$(1)'
	@touch $@
endef

$(VENV)/.ready: $(VENV)/constraints.txt pyproject.toml
	$(call install,.)

$(VENV)/.ready-test: $(VENV)/.ready
	$(call install,.[test])

$(VENV)/.ready-dev: $(VENV)/.ready-test
	$(call install,.[dev])
