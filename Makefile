# Everything here sets itself up: a virtual environment beside the code, with the versions of constraints.txt.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
READY = $(VENV)/.ready
# The optimizers that ours is timed against live apart from what develops and tests it.
BENCH_VENV ?= .venv-bench
BENCH_READY = $(BENCH_VENV)/.ready
DOCS_VENV ?= .venv-docs
DOCS_READY = $(DOCS_VENV)/.ready
TRAINERS_VENV ?= .venv-trainers
TRAINERS_READY = $(TRAINERS_VENV)/.ready
# What either environment is made of: the kernels are compiled into it.
SOURCES = pyproject.toml constraints.txt setup.py $(wildcard src/floragrad/torch/backends/cpu/*.?pp)

SANITIZED = build/sanitized

.PHONY: demo compare bench replicate replicate-smoke test test-slow test-trainers sanitize lint types docs clean

demo: $(READY)  ## train a small Llama on the standard library's source, with Flora
	$(BIN)/floragrad train

compare: $(READY)  ## the same job with Flora, AdamW and Adafactor, one table and one picture
	$(BIN)/floragrad compare

bench: $(BENCH_READY)  ## a step's time, state and temporaries beside every peer's; leave the machine alone meanwhile
	$(BENCH_VENV)/bin/python -m benchmarks.step

replicate: $(READY)  ## the paper's experiments, at their default sizes
	set -e; for each in figure1 figure2 tables; do $(BIN)/python -m replication.$$each; done

replicate-smoke: $(READY)  ## the same programs at toy sizes; they are among the tests
	$(BIN)/python -m pytest tests/replication

# The bytecode of torch, transformers and JAX is kept, or every process that a test starts compiles them again.
unexport PYTHONDONTWRITEBYTECODE

# A file's tests run in one process, which makes their fixtures and compiles JAX's programs once.
PARALLEL = -n auto --dist loadfile --no-loadscope-reorder

test: $(READY)  ## every test, on every core
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(READY)  ## the tests that take minutes, which `make test` leaves out
	$(BIN)/python -m pytest -n auto --dist loadgroup -m slow

test-trainers: $(TRAINERS_READY)  ## torchtitan, axolotl, ms-swift, verl, NeMo Automodel and litgpt, which `make test` does without
	$(TRAINERS_VENV)/bin/python -m pytest -m trainers tests/trainers

sanitize: $(READY)  ## the kernels under AddressSanitizer and UBSan, in a folder of their own, over the kernels' tests
	FLORAGRAD_SANITIZE=1 $(BIN)/python setup.py -q build_ext --build-lib $(SANITIZED) --build-temp $(SANITIZED)/objects
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0 FLORAGRAD_TEST_KERNELS=$(SANITIZED)/floragrad/torch/backends/cpu \
	$(BIN)/python -m pytest -p no:cacheprovider tests/torch/test_native.py tests/torch/test_guard_bands.py \
	tests/torch/test_validation.py tests/torch/test_accumulation_validation.py \
	-k "not (library_needs_nothing or second_openmp)"

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(DOCS_READY)  ## the site in build/site: a dead link or a missing docstring fails; a browser, if there is one, opens every page
	NO_MKDOCS_2_WARNING=1 $(DOCS_VENV)/bin/mkdocs build --strict
	$(DOCS_VENV)/bin/python -m pytest -q -m "" -p no:cacheprovider tests/site

clean:
	rm -rf $(VENV) $(BENCH_VENV) $(DOCS_VENV) $(TRAINERS_VENV) runs build src/*.egg-info

# Python compiles the modules that are imported, then; pip would compile thousands that never are.
QUIETLY = --quiet --disable-pip-version-check --no-compile

$(READY): $(SOURCES)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install $(QUIETLY) -c constraints.txt -e '.[dev]'
	touch $@

$(BENCH_READY): $(SOURCES)
	$(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install $(QUIETLY) -c constraints.txt -e '.[bench]'
	touch $@

# On top of the environment of `make test`, whose packages these are tested with.
PURELIB = -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(TRAINERS_READY): tests/trainers/requirements.txt $(READY)
	$(PYTHON) -m venv $(TRAINERS_VENV)
	echo "import site; site.addsitedir('$$($(BIN)/python $(PURELIB))')" > \
	"$$($(TRAINERS_VENV)/bin/python $(PURELIB))/below.pth"
	$(TRAINERS_VENV)/bin/python -m pip install $(QUIETLY) --no-deps --ignore-requires-python \
	-r tests/trainers/requirements.txt
	touch $@

# Docstrings are read, not imported: floragrad itself is installed without kernels, which take a minute to compile.
$(DOCS_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS_VENV)
	CC=false CXX=false $(DOCS_VENV)/bin/python -m pip install $(QUIETLY) -c constraints.txt '.[docs]'
	touch $@
