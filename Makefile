# make demo: install, then the mini and published studies, offline. make test: install, then every test.

PYTHON ?= python3
CORES ?= $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
BIN := .venv/bin
SNAKEMAKE := $(BIN)/snakemake --cores $(CORES)

.PHONY: demo test check envs lock clean

demo: .venv/installed
	$(SNAKEMAKE) --configfile config/published.yaml
	$(SNAKEMAKE) --configfile config/mini.yaml
	$(BIN)/python -m clip_robustness page-index --out figures/index.html \
		--reports figures/mini/report.html figures/published/report.html
	@echo "Open figures/index.html"

test: .venv/installed
	$(BIN)/pytest

check: .venv/installed
	$(BIN)/ruff check src tests benchmarks
	$(BIN)/ruff format --check src tests benchmarks
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile rules
	$(BIN)/snakemake --lint

# Every env of envs/, the one with torch included, installed alone from its pins, runs its wing's verb.
envs: .venv/installed
	CLIP_ROBUSTNESS_ALL_ENVS=1 $(BIN)/pytest tests/workflow/test_envs.py

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
	rm -rf .snakemake results logs resources/mini figures/*/ figures/index.html figures/*.pdf figures/*.png
