# The commands of this project. Each installs what it needs first (Debian packages, .venv) and does so only once.
#
#   make setup   install and build everything          make test    run the tests (ARGS="-k name" for some)
#   make demo    show it working, in about a minute     make bench   compare it with others (QUICK=1: 3 minutes)
#   make demo-services   show services that find each other while instances come, go and crash, in about a minute
#   make demo-migration  show downloads that move to other interfaces and addresses (ARGS="--plots DIRECTORY"), in about a minute
#   make lint    ruff and mypy                          make clean   remove what was built
SHELL := /bin/bash
VENV := .venv
RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip install --quiet --disable-pip-version-check
BUILD_INPUTS := setup.py pyproject.toml $(shell find serval_core translator -name '*.pyx' -o -name '*.pxd' -o -name '*.bpf.c' -o -name '*.h')
PRINT_EXTRAS := import tomllib; \
    print(*sum(tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"].values(), []), sep="\n")
PRINT_PLOT_TOOLS := import tomllib; \
    print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["bench"], sep="\n")
ARGS :=

.PHONY: setup demo demo-services demo-migration test bench lint clean root
.DELETE_ON_ERROR:

setup: root $(VENV)/.test-tools

demo: root $(VENV)/.built
	$(RUN) -m lab.demo

demo-services: root $(VENV)/.built
	$(RUN) -m lab.demo_services

demo-migration: root $(VENV)/.built $(VENV)/.plot-tools
	$(RUN) -m lab.demo_migration $(ARGS)

test: root $(VENV)/.test-tools
	$(RUN) -m pytest $(ARGS)

bench: root $(VENV)/.test-tools
	$(RUN) -m bench $(if $(QUICK),--quick) $(ARGS)

lint: $(VENV)/.test-tools
	$(RUN) -m ruff check .
	$(RUN) -m mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find serval_core translator \( -name '*.so' -o -name '*.bpf.o' \) -delete
	find serval_core translator -name '*.pyx' | sed 's/pyx$$/c/' | xargs -r rm -f
	find . -name __pycache__ -prune -exec rm -rf {} +

root:
	@[ "$$(id -u)" = 0 ] || { echo "Run this as root (sudo make): it installs packages and makes network namespaces." >&2; exit 1; }

# Stamps: the Debian packages, the virtual environment, the built project in it, the tools of tests and benchmark.
$(VENV)/.debian-demo: lab/install.sh | root
	lab/install.sh demo
	mkdir -p $(VENV) && touch $@

$(VENV)/.debian-test: lab/install.sh | root
	lab/install.sh test
	mkdir -p $(VENV) && touch $@

$(VENV)/.made: $(VENV)/.debian-demo
	"$$(lab/install.sh python)" -m venv $(VENV)
	touch $@

$(VENV)/.built: $(VENV)/.made $(BUILD_INPUTS) | root
	$(PIP) --editable .
	touch $@

$(VENV)/.test-tools: $(VENV)/.debian-test $(VENV)/.built pyproject.toml | root
	$(RUN) -c '$(PRINT_EXTRAS)' | $(PIP) --requirement /dev/stdin
	touch $@

$(VENV)/.plot-tools: $(VENV)/.made pyproject.toml | root
	$(RUN) -c '$(PRINT_PLOT_TOOLS)' | $(PIP) --requirement /dev/stdin
	touch $@
