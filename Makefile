# make figures   every notebook, executed, and every figure
# make test      lint, unit tests, and every notebook compared with its committed outputs
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PROFILE ?= quick
NOTEBOOKS ?=
JOBS ?= 1
TEST_JOBS ?= 2
CONSTRAINTS ?= constraints.txt
VENV ?= .venv

PY := $(VENV)/bin/python
PIP ?= $(PY) -m pip
STAMP := $(VENV)/.installed
# Figures drawn while testing go here, so that a test never changes a committed figure.
TEST_FIGURES := $(CURDIR)/build/test-figures

# The environment is sound when its own Python runs and finds this checkout's paperlib in it.
IS_SOUND := import importlib.util as u, os, sys; \
    places = list(u.find_spec("paperlib").submodule_search_locations); \
    sys.exit(not os.path.samefile(places[0], "paperlib"))
ifneq ($(filter-out clean distclean help,$(or $(MAKECMDGOALS),help)),)
ifneq ($(shell $(PY) -I -c '$(IS_SOUND)' 2>/dev/null && echo sound),sound)
$(shell rm -f $(STAMP))
endif
endif

.PHONY: help install figures notebooks test lint unit-tests notebook-tests book browser-tests lab explorer clean distclean

help: ## Show this list
	@echo "Targets:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile
	@echo
	@echo "Settings, after the target:"
	@echo "  PROFILE=quick|laptop|paper  parameters of the notebooks (notebooks/parameters/PROFILE)"
	@echo "  NOTEBOOKS='00_... 01_...'   only these notebooks"
	@echo "  JOBS=N                      notebooks that run at the same time"
	@echo "  CONSTRAINTS=                the newest versions allowed, not the tested ones"

# Installed once, and again when what is to be installed changes. Without the stamp the environment
# is missing, half made or moved: it is made anew.
install: $(STAMP) ## Make .venv and install the project into it
$(STAMP): pyproject.toml $(wildcard $(CONSTRAINTS))
	@if [ ! -e $(STAMP) ]; then \
	    for python in "$${PYTHON:-python3}" python3.14 python3.13 python3.12 python3.11 python; do \
	        if "$$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	            break; \
	        fi; \
	        python=; \
	    done; \
	    if [ -z "$$python" ]; then \
	        echo "Python 3.11 or newer was not found; name it with make PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "Making $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo "Installing the project into $(VENV); the first time takes some minutes"
	@$(PIP) install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[notebooks,test]'
	@touch $(STAMP)

# What only some targets need is installed when they are first asked for.
$(VENV)/.installed-%: $(STAMP)
	@echo "Installing what '$*' needs into $(VENV)"
	@$(PIP) install $(if $(CONSTRAINTS),--constraint $(CONSTRAINTS)) --editable '.[$*]'
	@touch $@

figures: $(STAMP) ## Run the notebooks that changed and draw every figure
	@$(PY) -m paperlib.run_notebooks --profile $(PROFILE) --jobs $(JOBS) $(NOTEBOOKS)

notebooks: $(STAMP) ## The same, and refresh the outputs committed in notebooks/
	@$(PY) -m paperlib.run_notebooks --in-place --jobs $(JOBS) $(NOTEBOOKS)

test: lint unit-tests notebook-tests ## Lint, unit tests, every notebook against its outputs

lint: $(STAMP) ## Lint and check the format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# One thread a worker: the workers share the cores, and a fixed number of threads makes the rounding
# the same on every machine of one kind.
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 TQDM_DISABLE=1 PAPERLIB_PROGRESS=0 \
    PAPERLIB_FIGURES='$(TEST_FIGURES)'
PARALLEL := -n $(TEST_JOBS) --dist loadscope

unit-tests: $(STAMP) ## Only the unit tests
	$(TEST_ENVIRONMENT) $(PY) -m pytest $(PARALLEL) --durations 10 tests

notebook-tests: $(STAMP) ## Only the notebooks against their committed outputs
ifneq ($(wildcard notebooks/*.ipynb),)
	@mkdir -p '$(TEST_FIGURES)'
	$(TEST_ENVIRONMENT) $(PY) -m pytest $(PARALLEL) --nbval-lax --nbval-current-env notebooks/
endif

# Without Chromium they are skipped. On Debian: apt-get install chromium chromium-driver.
browser-tests: book $(VENV)/.installed-browser ## Test notebooks and book in a browser (Chromium)
	OMP_NUM_THREADS=1 $(PY) -m pytest --durations 5 tests/browser

# Sphinx wants everything below one folder. Times are kept: only what changed is read again.
BOOK_SOURCES := README.md CONTRIBUTING.md CHANGELOG.md CITATION.cff LICENSE pyproject.toml \
    notebooks figures benchmarks

book: $(VENV)/.installed-book ## Make the chapters and the reference into a web site in build/book
	@rm -rf build/book-source && mkdir -p build/book-source
	@cp -a $(wildcard $(BOOK_SOURCES)) docs/. build/book-source/
	$(PY) -m sphinx -W --keep-going -q -b html -d build/book-doctrees build/book-source build/book
	@echo "Open build/book/index.html"

lab: $(STAMP) ## Open the notebooks in JupyterLab
	$(PY) -m jupyterlab --notebook-dir notebooks

explorer: $(STAMP) ## Open the explorer as a web page
	$(PY) -m voila notebooks/18_explorer.ipynb

clean: ## Remove what was generated, except committed figures
	rm -rf executed build .pytest_cache .ruff_cache *.egg-info
	find paperlib tests notebooks benchmarks -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true

distclean: clean ## Remove .venv too
	rm -rf $(VENV)
