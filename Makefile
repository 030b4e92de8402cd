# kd_det: `make demo` shows it at work, `make test` tests it, `make lint` checks style and types, `make docs` builds the site
# of its documentation. They need Python and make, nothing else.

PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2

BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt
# Written when an install has finished; it is done again only when what it installs from has changed.
INSTALLED := $(VENV)/.installed

.PHONY: help install demo test soak lint docs clean

help:  ## Show this help.
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 20
	@echo 'PYTHON=python3.11 chooses the Python that makes $(VENV); WORKERS=4 the processes of the tests.'

install: $(INSTALLED)  ## Make the virtual environment .venv and install kd_det with MMDetection into it.

demo: $(INSTALLED)  ## Generate data, train a teacher and two students, and compare them: plain and distilled.
	$(BIN)/kd-det demo

test: $(INSTALLED)  ## Run all tests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal tests

soak: $(INSTALLED)  ## Kill trainings and benchmarks at moments of chance, resume them, and compare what they end in.
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.soak

lint: $(INSTALLED)-lint  ## Check style and imports with ruff, and types with mypy.
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy

docs: $(INSTALLED)-docs  ## Build the site of the documentation, build/site/index.html; a dead link is an error.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --config-file docs/site/mkdocs.yml

clean:  ## Remove the virtual environment and what builds leave behind; data and runs stay.
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(INSTALLED): setup.py pyproject.toml constraints.txt kd_det/compat/startup.py | $(BIN)/python
	$(PIP_INSTALL) setuptools wheel
	$(PIP_INSTALL) --no-build-isolation --editable '.[mmdet,test]'
	@# A machine without a screen may lack libGL, which OpenCV's desktop build wants.
	$(BIN)/python -c 'import cv2' 2>/dev/null || $(PIP_INSTALL) --force-reinstall --no-deps opencv-python-headless
	@touch $@

# What a target needs beyond that: the extra of its name in setup.py.
$(INSTALLED)-%: $(INSTALLED)
	$(PIP_INSTALL) --no-build-isolation --editable '.[$*]'
	@touch $@
