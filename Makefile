# Everything a newcomer needs: `make reproduce-figure1` and `make test`. `make setup` is implied and does nothing when current.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What this machine can use: PyTorch everywhere; MLX on Apple silicon and Linux. `make setup BACKENDS=cuda` or `=mlx` narrows it.
UNAME := $(shell uname -s)
BACKENDS ?= $(if $(filter Darwin,$(UNAME)),mlx,cuda,mlx)
comma := ,
EXTRAS := $(subst $(eval ) ,$(comma),$(strip $(subst $(comma), ,$(BACKENDS)) dev $(if $(findstring cuda,$(BACKENDS)),peft)))
STAMP := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# The headline figure; for the paper's own scale: make reproduce-figure1 SIZE=small BACKEND=cuda DATA=... PRETRAIN=...
RECIPE ?= $(if $(filter tiny small medium large xl,$(SIZE)),figure1-paper,figure1)
SEED ?= 0
BACKEND ?= auto
OUTPUT ?= runs/$(RECIPE)-seed$(SEED)
SETTINGS = --set seed=$(SEED) --set backend=$(BACKEND) $(if $(SIZE),--set model=$(SIZE)) $(if $(DATA),--set target=$(DATA)) $(if $(PRETRAIN),--set pretrain=$(PRETRAIN))

.DEFAULT_GOAL := help
.PHONY: help setup lint type test test-full test-no-torch test-no-mlx test-oldest test-faults fuzz mutants audit-dependencies bench parity coverage intervals docs pages reproduce-figure1 reproduce-ladder reproduce-laws reproduce-replay reproduce-toy clean

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-20s %s\n", $$1, $$2}'

setup: $(STAMP)  ## install into .venv what this machine can use (BACKENDS=cuda or mlx narrows it)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(findstring cuda,$(BACKENDS)),$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)")
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[$(EXTRAS)]'
	@rm -f $(VENV)/.installed-*
	@touch $@

lint: setup  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

type: setup  ## mypy, strict
	$(BIN)/mypy

# Of the tests, these: `make test TESTS=tests/laws`.
TESTS ?= tests
WORKERS ?= 2
test: setup  ## every suite in its short form: at most 15 minutes on two cores; TESTS= for some, WORKERS= processes
	$(BIN)/python -m pytest -q -m "not full" -n $(WORKERS) --dist loadfile $(TESTS)

test-full: setup  ## every suite in its long form
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist loadfile

# In environments of their own, which `make clean` removes. PYTHON=python3.13 tries another Python.
test-no-torch:  ## the short tests where PyTorch is not installed: MLX alone; PYTHON= TESTS=
	$(MAKE) test VENV=build/no-torch BACKENDS=mlx

test-no-mlx:  ## the short tests where MLX is not installed: PyTorch alone; PYTHON= TESTS=
	$(MAKE) test VENV=build/no-mlx BACKENDS=cuda

# With MLX: the oldest PyTorch that is allowed has no build for CPUs on the package index. The oldest Python, because older packages have
# no files for newer ones.
OLDEST := build/oldest
test-oldest:  ## the short tests with the oldest versions that pyproject.toml allows, on Python 3.11; TESTS=
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "make test-oldest needs Python 3.11: PYTHON=python3.11")'
	$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(OLDEST)/bin/uv pip install --quiet --python $(OLDEST)/bin/python --resolution lowest-direct --editable '.[mlx,hf,dev]'
	$(OLDEST)/bin/python -m pytest -q -m "not full" -n $(WORKERS) --dist loadfile $(TESTS)

bench: setup  ## speed against named baselines, as ratios measured in one run
	for file in tests/benchmarks/bench_*.py; do $(BIN)/python $$file || exit 1; done

test-faults: setup  ## killed, cut off, full, read-only and damaged at every named point; prints its counts; about two hours
	$(BIN)/python -m pytest -q tests/faults

COVERAGE = $(BIN)/python -m coverage
EXAMPLES ?= 10000
fuzz: setup  ## every file reader on files that are almost right: EXAMPLES= of each; READERS='state or adapter' for some
	FUZZ_EXAMPLES=$(EXAMPLES) $(BIN)/python -m pytest -q -s tests/fuzz $(if $(READERS),-k "$(READERS)")

SEED_OF_MUTANTS ?= 0
mutants: setup  ## 200 small seeded mistakes in laws, mixture, checkpoint and records, and which tests notice; goes on where it was stopped
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python -m tests.mutants --seed $(SEED_OF_MUTANTS)

# In an environment of its own; --strict, so that a package that the database could not be asked about is no success.
audit-dependencies:  ## known vulnerabilities of the pinned dependencies, by pip-audit; needs pypi.org
	test -x build/audit/bin/pip-audit || $(PYTHON) -m venv build/audit
	build/audit/bin/python -m pip install --quiet --disable-pip-version-check pip-audit
	build/audit/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt

parity: setup  ## measure how far the two backends differ and write the table into README.md; about five minutes
	$(BIN)/python -m tests.backends.parity_table README.md

# Left out: what holds a backend to numbers, and what runs the same code again to break it.
NOT_MEASURED = fuzz faults mutants test_bench_cuda.py $(addprefix backends/test_,$(addsuffix .py,parity numerics compiled qknorm optimizers \
	allocator step_memory sharded mlx_backend blocks frozen_head adapters_pretrained))
coverage: setup  ## lines and branches of core, pipeline and laws that the short tests run, in child processes too; fails where one is below 90%
	rm -rf build/coverage
	$(COVERAGE) run -m pytest -q -m "not full" -n $(WORKERS) --dist loadfile $(TESTS) $(NOT_MEASURED:%=--ignore=tests/%)
	$(COVERAGE) combine --quiet
	$(COVERAGE) html --quiet
	$(COVERAGE) json --quiet -o build/coverage/report.json
	$(COVERAGE) report
	$(BIN)/python -m tests.coverage_floor build/coverage/report.json 90

intervals: setup  ## do the laws' 95% intervals cover? 2,000 simulations a scenario; about half an hour
	OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 PYTHONPATH=. $(BIN)/python tests/laws/coverage.py

docs: setup  ## the tables of docs/*.md, and the site, complete without a network: build/site/index.html
	$(BIN)/python docs/_hooks/from_code.py
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

pages: setup  ## open the pages of docs/ in a headless browser, and keep pictures in build/pages
	$(BIN)/python -m tests.check_pages build/pages

reproduce-figure1: setup  ## Figure 1 of the paper at laptop scale; SEED= SIZE= DATA= PRETRAIN= BACKEND= OUTPUT=
	$(BIN)/forget sweep $(RECIPE) $(SETTINGS) --output $(OUTPUT)
	$(BIN)/forget plot $(OUTPUT) --output figures --name $(if $(filter 0,$(SEED)),$(RECIPE),$(RECIPE)-seed$(SEED))

# Every table of published runs with its law, and those of our own runs that have one: fit.json and figures each.
LAWS = figures/laws
FIT = $(BIN)/forget fit
reproduce-laws: setup  ## refit and redraw the laws from the committed tables, in under a minute: figures/laws
	$(FIT) data/reference/chinchilla_twin.csv --law chinchilla -o $(LAWS)/chinchilla/fit.json --plot $(LAWS)/chinchilla
	$(FIT) data/reference/gemstones.csv --law chinchilla --by subset --map run=run_name -o $(LAWS)/gemstones/fit.json --plot $(LAWS)/gemstones
	$(FIT) data/reference/datablations.csv --law chinchilla --where 'D <= U' -o $(LAWS)/datablations/fit.json --plot $(LAWS)/datablations
	$(FIT) data/reference/cmr_gu2024.csv --law cmr --by model -o $(LAWS)/cmr/fit.json --plot $(LAWS)/cmr
	$(FIT) data/reference/replay_ibrahim2024.csv --law bethune-forgetting-e --by setting --fix beta=0 -o $(LAWS)/replay/fit.json --plot $(LAWS)/replay
	$(FIT) data/runs/figure1.parquet --law forgetting-fixed-n --fix beta=0 -o $(LAWS)/figure1/fit.json --plot $(LAWS)/figure1

# Goes on where it was stopped; what fits of the study so far say, `forget plot` prints at any time.
LADDER := $(if $(filter command line,$(origin OUTPUT)),$(OUTPUT),runs/ladder-builtin)
reproduce-ladder: setup  ## the laws measured at laptop scale: 225 runs, their tables and figure; resumable; BACKEND= OUTPUT=
	$(BIN)/forget sweep ladder-builtin --set backend=$(BACKEND) --output $(LADDER)
	$(BIN)/forget plot $(LADDER) --kind laws --output figures --name ladder-builtin

reproduce-replay: setup  ## methods compared at laptop scale (Marek et al.); SEED= BACKEND= OUTPUT=
	$(BIN)/forget sweep replay --set seed=$(SEED) --set backend=$(BACKEND) --output $(if $(filter command line,$(origin OUTPUT)),$(OUTPUT),runs/replay-seed$(SEED))
	$(BIN)/forget plot $(if $(filter command line,$(origin OUTPUT)),$(OUTPUT),runs/replay-seed$(SEED)) --output figures --name $(if $(filter 0,$(SEED)),replay,replay-seed$(SEED))

# All four of the paper: make reproduce-toy TASKS=add,reversal,sort,modadd
TASKS ?= reversal,sort
STEPS ?= 600
TOY = toy-continual$(if $(filter 600:reversal$(comma)sort,$(STEPS):$(TASKS)),,-$(subst $(comma),-,$(TASKS))-$(STEPS))
TOY_OUTPUT = $(if $(filter command line,$(origin OUTPUT)),$(OUTPUT),runs/$(TOY))
reproduce-toy: setup  ## tasks learnt one after another, with and without self-generated replay (Marek et al.), at a small size; TASKS= STEPS= BACKEND= OUTPUT=
	$(BIN)/python -m mlx_forget.studies.toy_continual --tasks $(TASKS) --shape 2x64 --batch-size 256 --steps $(STEPS) --learning-rate 3e-3 --warmup-steps 60 --backend $(BACKEND) --output $(TOY_OUTPUT)
	$(BIN)/forget plot $(TOY_OUTPUT) --output figures --name $(TOY)

clean:  ## remove the environment, builds and caches of tools; runs, figures and corpora stay
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
