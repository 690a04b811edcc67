# make serve   a server on 127.0.0.1:8000, from nothing: environment, installation, embedded model
#              MODEL=Qwen/Qwen3-8B TP=2 PORT=8000 ARGS='--max-model-len 8192' choose otherwise
# make test    the tests that need neither GPU nor patience, from nothing as well
#              JOBS=0 ARGS='tests/http -x' run some of them, in one process
# make check   lint, format, types        make bench     tpqwen compare on the embedded model
# make image   the container image        make clean     everything that can be made again

PYTHON ?= python3
VENV   ?= .venv
MODEL  ?=
TP     ?= 1
PORT   ?= 8000
ARGS   ?=
IMAGE  ?= tpqwen:0.1.0
JOBS   ?= auto
PYTEST ?= -m "not gpu and not slow and not container" -n $(JOBS) --maxprocesses 4 --no-loadscope-reorder

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

.PHONY: serve test check bench image map constraints clean

serve: $(VENV)/installed
	$(BIN)/tpqwen serve $(MODEL) --tp $(TP) --port $(PORT) $(ARGS)

test: $(VENV)/installed-dev
	$(BIN)/python -m pytest $(PYTEST) $(ARGS)

check: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/installed
	$(BIN)/tpqwen compare $(MODEL) $(ARGS)

image:
	docker build -f deploy/Dockerfile -t $(IMAGE) .

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || \
	  { echo "Python 3.11, 3.12 or 3.13 is needed; choose one: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing tpqwen and PyTorch into $(VENV), once; this takes minutes"
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: $(VENV)/installed
	$(PIP) -e '.[dev]'
	@touch $@

map: $(VENV)/installed
	$(BIN)/python tools/readme_map.py

constraints: $(VENV)/installed-dev
	@{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable \
	  --exclude torch --exclude triton --exclude setuptools; } > constraints.new && mv constraints.new constraints.txt

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
