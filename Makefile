# Every target bootstraps what it needs: uv (scripts/uv), then the packages of uv.lock into .venv.
UV := scripts/uv
RUN := $(UV) run --no-sync
TEST_WORKERS ?= 2
PYTEST := $(RUN) pytest -n $(TEST_WORKERS)

# Downloads and the demo's checkpoint stay in the folder, unless the caller keeps a cache elsewhere.
ELASTIC_JAX_CACHE ?= $(CURDIR)/.cache/elastic-jax
export ELASTIC_JAX_CACHE

.DEFAULT_GOAL := help
.PHONY: help demo test test-all test-gpu lint format docs new-user install-size kernels sync clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.synced ## convert, compile and run a small real model in every mode, on the CPU
	@$(RUN) elastic-jax demo

test: .venv/.synced ## run the tests, without those that take minutes or a GPU
	@$(PYTEST) -m "not slow and not gpu"

test-all: .venv/.synced ## run every test that needs no GPU, with JAX's CUDA plugin, which some compile with
	@$(UV) sync --frozen --inexact --extra cuda13
	@$(PYTEST) -m "not gpu"

test-gpu: .venv/.synced ## run the tests that need an NVIDIA GPU
	@$(UV) sync --frozen --inexact --extra cuda13
	@JAX_PLATFORMS=cuda,cpu $(RUN) pytest -m gpu

lint: .venv/.synced ## check lint, format, types, and that README shows the committed results
	@$(RUN) ruff check
	@$(RUN) ruff format --check
	@$(RUN) pyright
	@$(RUN) python benches/readme.py --check

format: .venv/.synced ## mend lint and format where a machine can
	@$(RUN) ruff check --fix
	@$(RUN) ruff format

docs: .venv/.synced ## build the documentation into .cache/site; a warning is an error
	@$(UV) sync --quiet --frozen --inexact --group docs
	@$(RUN) sphinx-build --quiet --fail-on-warning --keep-going --nitpicky docs .cache/site
	@echo "The documentation is in .cache/site/index.html"

new-user: ## follow docs/start.md literally in a fresh environment, and time it
	@python3 scripts/new_user.py

install-size: .venv/.synced ## print the sizes of the wheels that a base installation downloads
	@$(RUN) python scripts/install_size.py

kernels: .venv/.synced ## build the CUDA kernels again (needs nvcc of CUDA 13, and no GPU)
	@PYTHON=$(CURDIR)/.venv/bin/python bash elastic_jax/kernels/cuda/build.sh

sync: .venv/.synced ## install the locked packages into .venv

# --inexact keeps the extras (cuda13, say) that somebody has added by hand.
.venv/.synced: uv.lock pyproject.toml .python-version
	@echo "Installing the packages of uv.lock into .venv"
	@$(UV) sync --frozen --inexact
	@touch $@

clean: ## remove .venv and .cache
	rm -rf .venv .cache
