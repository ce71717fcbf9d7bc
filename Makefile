# make        the environment, in .venv/ (VENV=PATH uses another one, with its own torch)
# make demo   names the shipped synthetic cells with the shipped model and writes out/demo/report.html
# make test   lint, types and tests
# make docs   writes docs/cli.md anew

PYTHON ?= python3
VENV ?= .venv
# PyPI's torch for Linux brings CUDA. For the smaller build without it:
#   make TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := $(VENV)/bin
READY := $(VENV)/.cytodiffusion-ready

.PHONY: all demo test lint docs clean
all: $(READY)

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "CytoDiffusion needs Python 3.11 or later; $(PYTHON) is older. Try: make PYTHON=python3.12"; exit 2; }
	@$(PYTHON) -m venv $(VENV) \
	  || { echo "No virtual environment could be made. On Debian or Ubuntu: sudo apt install python3-venv"; exit 2; }

$(READY): $(BIN)/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -c constraints.txt torch
	@grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt # a torch that is there stays
	$(BIN)/python -m pip install --quiet -c $(VENV)/constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)
	$(BIN)/cytodiffusion demo

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest

docs: $(READY)
	$(BIN)/python docs/make_cli.py

clean:
	rm -rf $(VENV) out dist build
