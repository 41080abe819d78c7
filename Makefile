# Every target does its own set-up: the venv, the engine, the image, and (as root on Debian) the two programs
# that come from apt. What is there already costs under a second.

PYTHON  ?= python3
SESSION ?= conv
ARGS    ?=

BIN    := .venv/bin
STAMPS := .cache/make

.DEFAULT_GOAL := help
.PHONY: help demo test check format image viewer lab bench crash soak gvisor engine venv browser clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: image ## a pandas/matplotlib analysis in a container session, then its record in the viewer
	$(BIN)/python examples/demo.py
	$(BIN)/python -m viewer sessions/conv

test: image browser ## all tests [ARGS="-k word"]
	$(BIN)/python -m pytest $(ARGS)

check: venv ## ruff, formatting, mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: venv ## format and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

image: engine ## sandbox:latest and sandbox-egress:latest, built when their recipes have changed
	@$(call need,mmdebstrap,mmdebstrap)
	@$(BIN)/sandbox-kernel image build
	@$(BIN)/sandbox-kernel image build --egress

engine: venv ## a Docker Engine that answers
	@$(BIN)/sandbox-kernel engine up --yes

viewer: venv ## the record of a session [SESSION=conv] [ARGS="--limit 10"]
	@$(BIN)/python -m viewer sessions/$(SESSION) $(ARGS)

lab: image ## JupyterLab on a running session [SESSION=conv]
	$(BIN)/sandbox-kernel lab $(SESSION) $(ARGS)

bench: image $(STAMPS)/bench ## the table of benchmarks/results/ [ARGS=...]
	$(BIN)/python -m benchmarks $(ARGS)

crash: image ## SIGKILL at random moments; the books must balance [ROUNDS=200] [SEED=...]
	PYTHONPATH=tests $(BIN)/python -m campaigns.crash $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

soak: image ## many sessions for long; nothing may be left behind [ROUNDS=20] [SEED=...] [ARGS="--cells 200"]
	PYTHONPATH=tests $(BIN)/python -m campaigns.soak $(if $(ROUNDS),--sessions $(ROUNDS)) $(if $(SEED),--seed $(SEED)) $(ARGS)

gvisor: image ## the attacks on sessions under gVisor, fetched, on an engine of its own; as root [ARGS="-k word"]
	@$(call need,ip,iproute2)
	PYTHONPATH=tests $(BIN)/python -m campaigns.gvisor $(ARGS)

venv: $(STAMPS)/venv ## the environment in .venv

browser:
	@$(call need,chromium,chromium)

clean: ## remove caches and the venv; sessions stay
	rm -rf .venv .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(STAMPS)/venv: pyproject.toml
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Python 3.11 or newer is needed: make PYTHON=python3.12"'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[dev]'
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/bench: $(STAMPS)/venv
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable '.[bench]'
	@touch $@

# $(call need,PROGRAM,PACKAGE): install it from apt where we may, say how where we may not. What really needs the
# program fails by its own name.
need = command -v $(1) >/dev/null || { \
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	  echo "$(1) is missing. To mend that: apt-get install --no-install-recommends $(2)"; \
	  apt-get update -qq >/dev/null && DEBIAN_FRONTEND=noninteractive \
	    apt-get install -qq -y --no-install-recommends $(2) >/dev/null; \
	else echo "$(1) is missing; where it is needed: sudo apt-get install $(2)"; fi; }
