# `make demo`, `make test`: everything from a fresh clone, with Python >= 3.11, git and make only.
#   make demo                                  handwritten digits, minutes on a CPU
#   make demo DATA=cifar10                     downloads CIFAR-10
#   make demo DATA=cifar10 ARCHIVE=file.tar.gz a local archive instead
#   make demo OVERWRITE=1                      anew, over an earlier demo
#   make docs                                  the documentation as a site, docs/_build/html
#   make learn                                 the lessons of docs/learn and their figures; LESSONS="04 13", FULL=1

# the first of these that runs and is new enough
PYTHON ?= $(shell for name in python3 python3.12 python3.11 python3.13; do \
	$$name -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$name; break; }; done)
DATA ?= digits
OUT ?= runs/demo$(if $(filter-out digits,$(DATA)),-$(DATA))
READY := .venv/.ready

.PHONY: demo test test-smoke test-all coverage lint docs learn drill mutants clean

demo: $(READY)
	.venv/bin/sslvit demo --data $(DATA) --out $(OUT) $(if $(ARCHIVE),--archive $(ARCHIVE)) $(if $(OVERWRITE),--overwrite)

# side by side on two cores, each with one thread; the slow ones start processes of their own, and some measure
SIDE_BY_SIDE := OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not slow" -n 2 --dist worksteal

test: $(READY)
	$(SIDE_BY_SIDE)

# the slow tests that every change must pass: kill and resume, ranks, weights in shards
test-smoke: $(READY)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m smoke

test-all: $(READY) lint
	$(SIDE_BY_SIDE)
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m slow

coverage: $(READY)
	$(SIDE_BY_SIDE) --cov

# everything that can stop, damage or attack a job, tried at random: make drill SECONDS=3600 SEED=7
SECONDS ?= 600
SEED ?= 0

drill: $(READY)
	.venv/bin/python tools/drill/drill.py --seconds $(SECONDS) --seed $(SEED) --out runs/drill

# silent faults, one at a time in a copy: does a test fail? All take hours; make mutants SAMPLE=60 takes some of them
mutants: $(READY)
	.venv/bin/python tools/mutants/run.py $(if $(SAMPLE),--sample $(SAMPLE) --seed $(SEED))

lint: $(READY)
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

$(READY): setup.cfg pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "sslvit needs Python 3.11 or newer. Use: make PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setting up .venv (once; some minutes, 5 GB with the default torch)"
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	.venv/bin/python -m sslvit.environment
	@touch $@

# the documentation as a site, without network: docs/_build/html/index.html
docs: $(READY)
	.venv/bin/python -m sphinx -W --keep-going -q -b html docs docs/_build/html
	@echo "docs/_build/html/index.html"

# the lessons as they are written; FULL=1 also computes the numbers that they bring along
learn: $(READY)
	.venv/bin/python docs/learn/run.py $(LESSONS) $(if $(FULL),--full)

clean:
	rm -rf .venv build dist *.egg-info
