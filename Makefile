# make demo: install, then the mini and published studies, offline. make test: install, then every test.

PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)

.PHONY: demo test check docs envs faults audit fuzz lock clean

demo: .venv/installed
	$(SNAKEMAKE) --configfile config/published.yaml
	$(SNAKEMAKE) --configfile config/mini.yaml
	$(BIN)/python -m clip_robustness page-index --out figures/index.html \
		--reports figures/mini/report.html figures/published/report.html
	@echo "Open figures/index.html"

# What runs the workflow or trains a model takes all cores; of the rest, as many files at a time as there are cores.
test: .venv/installed
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(CORES) --dist loadfile -m "not slow"
	$(BIN)/pytest -m slow

check: .venv/installed
	$(BIN)/ruff check src tests benchmarks docs notebooks
	$(BIN)/ruff format --check src tests benchmarks docs notebooks
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# The site, with what the notebooks give on the published study and on models that they train; no network.
docs: .venv/installed
	$(SNAKEMAKE) --configfile config/published.yaml
	$(BIN)/sphinx-build --fail-on-warning docs docs/_build/html
	@echo "Open docs/_build/html/index.html"

# Every env of envs/, the one with torch included, installed alone from its pins, runs its wing's verb.
envs: .venv/installed
	CLIP_ROBUSTNESS_ALL_ENVS=1 $(BIN)/pytest tests/workflow/test_envs.py

# What can go wrong, done on purpose: 50 kills where `make test` has 5, and every rule on a full disk.
faults: .venv/installed
	CLIP_ROBUSTNESS_KILLS=50 $(BIN)/pytest tests/faults

# The pinned versions against the advisories of the package index, which needs a network; a package that could not be
# looked up fails it too.
audit:
	$(PYTHON) -m venv .venv/audit
	.venv/audit/bin/pip install --quiet pip-audit==2.10.1
	.venv/audit/bin/pip-audit --strict --no-deps --disable-pip --requirement requirements.lock

# Spoiled inputs for every reader, for FUZZ_MINUTES minutes (10).
fuzz: .venv/installed
	$(BIN)/python -m tests.fuzz

.venv/installed: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --requirement requirements.lock
	$(BIN)/pip install --quiet --no-deps --editable .
	touch $@

# Write the versions that are installed now as the lock; what only Linux has is marked so.
lock:
	$(BIN)/pip freeze --exclude-editable | sed -E \
		's/^((nvidia|cuda|triton)[a-z0-9-]*==[^ ]+)$$/\1 ; sys_platform == "linux" and platform_machine == "x86_64"/' \
		> requirements.lock

clean:
	rm -rf .snakemake results logs resources/mini figures/*/ figures/index.html figures/*.pdf figures/*.png docs/_build docs/generated
