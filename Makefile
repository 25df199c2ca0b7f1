PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin

.PHONY: setup megablocks quickstart test slurm test-slurm browser faults

setup: .venv/ready

.venv/ready: pyproject.toml $(BIN)/python
	$(BIN)/pip install --quiet --editable ".[dev]"
	$(BIN)/python tools/install_megablocks.py
	touch .venv/ready

$(BIN)/python:
	$(PYTHON) -m venv .venv

# the packages of model.kernel=megablocks (setup has them): also into a Python that is there, make megablocks BIN=DIR/bin
megablocks: $(BIN)/python
	$(BIN)/pip install --quiet --editable ".[megablocks]"
	$(BIN)/python tools/install_megablocks.py

# the main job on real text, in minutes: see exps/quickstart.sh
quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash exps/quickstart.sh

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n 2 --dist loadfile

# the pages of demos/ as a person uses them, in a Chromium or Chrome that is there
browser: setup
	$(BIN)/pip install --quiet --editable ".[browser]"
	$(BIN)/pytest tests/browser.py

# a Slurm to be started on this machine: Debian's, where there is none yet; needs root
slurm:
	test "$$(id -u)" = 0
	command -v slurmctld && command -v munged || (apt-get --quiet update && \
		apt-get install --yes --quiet --no-install-recommends slurm-wlm munge)

# runs under it
test-slurm: setup slurm
	$(BIN)/pytest tests/slurm.py

# every planted fault of tests/faults, and the check that must catch it: a quarter of an hour on two cores
faults: setup
	PYTHONPATH=tests $(BIN)/python -m faults
