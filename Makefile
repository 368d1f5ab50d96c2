# make demo and make test each set up .venv by themselves; neither needs the other.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
DOWNLOAD := 540 MB of packages with a build of torch for the CPU, several GB with one for CUDA
PY := $(VENV)/bin/python
STAMP := $(VENV)/.installed
PACKAGES := $(patsubst %/__init__.py,%,$(wildcard effadam_hook/__init__.py lightning_plugin/__init__.py))
KERNEL_SOURCES := $(wildcard effadam_hook/kernels/csrc/*.[ch])

# The tests wait for one another's processes more than they compute, so three run side by side.
TESTS_AT_ONCE ?= 3

# make test ARGS="-k harness", make demo ARGS="--workers 4", make bench ARGS="--csv out.csv"
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help venv demo test check dist schemas docs docs-serve docs-release fuzz soak bench bench-gpu gpu-check sanitize fmt clean

help:
	@echo "make demo    train a small GPT on 2 local workers, dense and compressed, and compare"
	@echo "make test    run the test suite"
	@echo "make check   ruff, mypy, the documentation with warnings as errors, dist and schemas"
	@echo "make dist    build source archive and wheel into build/dist, and check what an index will see"
	@echo "make schemas check the forge's files: workflows, issue forms, citation"
	@echo "make docs    build the documentation into build/site; make docs-serve shows it while you write,"
	@echo "             make docs-release RELEASE=0.2 adds a version to the branch gh-pages"
	@echo "make fuzz    draw random runs and faults for MINUTES=30, renew the table in docs/reliability.md"
	@echo "make soak    10,000 steps of a tiny model on three ranks"
	@echo "make bench   time the kernels"
	@echo "make bench-gpu  check the kernels on this machine's GPU, then time them"
	@echo "make gpu-check  check everything on this machine's GPUs in 9 minutes; needs torch and Triton only"
	@echo "make sanitize   run the C kernels' tests under the address and undefined sanitizers"
	@echo "make fmt     format the code"
	@echo "make venv    only set up $(VENV)"
	@echo "make clean   remove $(VENV), build products and caches"

venv: $(STAMP)

$(STAMP): pyproject.toml setup.py constraints.txt effadam_hook/_version.py $(KERNEL_SOURCES)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $(STAMP)

# The first run installs, which is nearly all that it downloads: it says so before it starts.
demo:
	@test -f $(STAMP) || echo "make demo: the first run sets up $(VENV) and downloads about $(DOWNLOAD)." \
		"The demo itself downloads nothing."
	@$(MAKE) --no-print-directory venv
	$(PY) examples/train_text.py --compare --workers 2 --quantizers lloyd4,lloyd2 --steps 400 $(ARGS)

test: $(STAMP)
	$(PY) -m pytest -n $(TESTS_AT_ONCE) --dist worksteal $(ARGS)

check: docs dist schemas
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy --strict $(PACKAGES)

DIST := build/dist

# The wheel is built from the source archive, so whatever the archive lacks is missed here.
dist: $(STAMP)
	rm -rf $(DIST)
	$(PY) -m build --no-isolation --quiet --outdir $(DIST)
	$(PY) -m twine check --strict $(DIST)/*
	$(PY) -m pyroma --min 10 .

SCHEMA := -m check_jsonschema --builtin-schema

schemas: $(STAMP)
	$(PY) $(SCHEMA) vendor.github-workflows .github/workflows/*.yml
	$(PY) $(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(PY) $(SCHEMA) vendor.github-issue-forms .github/ISSUE_TEMPLATE/bug.yml .github/ISSUE_TEMPLATE/feature.yml
	$(PY) $(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(PY) $(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(PY) $(SCHEMA) vendor.citation-file-format CITATION.cff

# The variable silences an advertisement of the theme's.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(ARGS)
	$(PY) tests/check_site.py

# A version of the site beside those that the branch has: RELEASE=0.2 is what readers see first, RELEASE=dev
# is a choice in the header. It commits to the branch gh-pages of this clone; ARGS=--push sends it.
RELEASE ?= dev
MIKE = PATH="$(abspath $(VENV))/bin:$$PATH" NO_MKDOCS_2_WARNING=1 mike

docs-release: $(STAMP)
	$(MIKE) deploy --update-aliases $(RELEASE) $(if $(filter-out dev,$(RELEASE)),stable) $(ARGS)
	$(if $(filter-out dev,$(RELEASE)),$(MIKE) set-default stable $(ARGS))

docs-serve: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs serve --strict $(ARGS)

MINUTES ?= 30

fuzz: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 $(abspath $(PY)) -m fuzz.campaign --minutes $(MINUTES) \
		--table ../docs/reliability.md $(ARGS)

soak: $(STAMP)
	cd tests && OMP_NUM_THREADS=1 $(abspath $(PY)) -m fuzz.soak $(ARGS)

bench: $(STAMP)
	$(PY) benchmarks/kernels.py $(ARGS)

bench-gpu: $(STAMP)
	$(PY) benchmarks/kernels.py --device cuda $(ARGS)

# Nothing is installed: the Python that has torch for this GPU runs it. GPU_PYTHON=/path/to/python names another.
GPU_PYTHON ?= python3

gpu-check:
	PYTHONPATH=benchmarks $(GPU_PYTHON) -m gpu_check $(ARGS)

SANITIZED := build/sanitize/_cpu.so
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined

sanitize: $(STAMP)
	mkdir -p $(dir $(SANITIZED))
	gcc -g -O1 -std=c11 -ffp-contract=off -fPIC -shared -pthread $(SANITIZE) \
		effadam_hook/kernels/csrc/*.c -o $(SANITIZED) -lm
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
		ASAN_OPTIONS=detect_leaks=0 EFFADAM_CPU_LIBRARY=$(SANITIZED) \
		$(PY) -m pytest -p no:cacheprovider tests/test_kernels_cpu.py tests/test_kernels_law.py \
		tests/test_kernels_fusions.py -k "not allocates" $(ARGS)

fmt: $(STAMP)
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f effadam_hook/kernels/_cpu*.so effadam_hook/kernels/_cpu*.dylib effadam_hook/kernels/_cpu*.dll
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
