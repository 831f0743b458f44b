# The two commands are `make run` and `make test`; both set up .venv first, once. `make help` lists the others.
VENV ?= .venv
CONFIG ?= configs/quickstart.yaml
JOBS ?= 3
BIN := $(VENV)/bin
export VENV

.PHONY: run lab help test test-fast lint bench docs reference parity-hpsv2 parity-imagereward images image-test lock setup clean

run: setup ## the whole pipeline on a small teacher, in minutes; again: what is sealed is skipped
	@$(BIN)/dmdr run $(CONFIG)

lab: setup ## a longer run: the lab's flow teacher, on 1,200 evaluation prompts
	@$(BIN)/dmdr run configs/lab-flow.yaml

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "%-20s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

test: lint ## lint, then all tests; in JOBS=3 processes of 2 GiB: on two cores, because many tests wait
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal

test-fast: setup ## the tests that start no process and no server, and do not compute for long
	@$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not process and not e2e and not slow"

lint: setup ## ruff (rules, format) and mypy over flows, stages and dmdr
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: setup ## what a student update costs
	@$(BIN)/python -m dmdr.planning.bench

docs: ## the pages of docs/ as a site in build/docs; its generator goes into build/docs-venv
	@test -x build/docs-venv/bin/mkdocs || { $${PYTHON:-python3} -m venv build/docs-venv && \
		build/docs-venv/bin/pip install -q --disable-pip-version-check -r docs/requirements.txt; }
	@NO_MKDOCS_2_WARNING=1 build/docs-venv/bin/mkdocs build --strict --quiet
	@echo "build/docs/index.html; with search: python3 -m http.server -d build/docs"

reference: setup ## docs/reference from the code of the commands and of the config
	@$(BIN)/python -m docs.scripts.reference

setup: ## .venv from requirements.lock; nothing if nothing changed
	@./setup.sh

parity-hpsv2: setup ## our HPSv2.1 beside the hpsv2 package, which is fetched into build/
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target build/hpsv2 hpsv2==1.2.0 clint args
	@$(BIN)/python tests/parity/hpsv2_package.py build/hpsv2

parity-imagereward: setup ## our ImageReward beside the image-reward package, which is fetched into build/
	@$(BIN)/pip install -q --disable-pip-version-check --no-deps --upgrade --target build/imagereward image-reward==1.5 timm==0.6.13
	@$(BIN)/python tests/parity/imagereward_package.py build/imagereward

images: ## dmdr-flow, dmdr-train, dmdr-evaluate, with podman, buildah or docker; options in images/build.sh
	@images/build.sh

image-test: setup ## builds and runs them; minutes; needs root and Debian's packages buildah and debootstrap
	@for each in buildah debootstrap unshare; do command -v $$each >/dev/null || \
		{ echo "image-test: $$each was not found; apt-get install buildah debootstrap util-linux" >&2; exit 1; }; done
	@test "$$(id -u)" = 0 || { echo "image-test: builds with chroot isolation; run it as root" >&2; exit 1; }
	@$(BIN)/python -m pytest -s tests/images/for_real.py

COMPILE = $(BIN)/uv pip compile -q --system-certs --python-version 3.11 --generate-hashes --no-header --no-annotate \
	--no-emit-find-links --no-emit-index-url

lock: setup ## requirements.lock from requirements.in, and the images' from it; takes no package newer than it must
	@$(COMPILE) --override overrides.txt requirements.in -o requirements.lock
	@rm -rf build/torch-cpu; version=$$(sed -n 's/^torch==\([^ ]*\).*/\1/p' requirements.lock); \
		$(BIN)/pip download -q --no-deps --dest build/torch-cpu $${TORCH_INDEX_URL:+--extra-index-url "$$TORCH_INDEX_URL"} \
		"torch==$$version+cpu" || echo "lock: set TORCH_INDEX_URL to an index with CPU builds; their hash is missing" >&2
	@$(BIN)/python images/lock.py --split build/torch-cpu
	@./setup.sh
	@$(BIN)/python images/lock.py

clean: ## remove .venv, build/ and all caches; runs/ stays
	@rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache
