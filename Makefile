# Two commands: `make pretrain` and `make test`. Each does its own set-up and reinstalls only after a change
# of pyproject.toml or constraints.txt.

PYTHON ?= python3
VENV := .venv
PIP := $(VENV)/bin/python -m pip --quiet --disable-pip-version-check

.PHONY: pretrain test test-peers check clean

pretrain: $(VENV)/.core
	$(VENV)/bin/fastssl train digits-diet

test: $(VENV)/.test
	$(VENV)/bin/python -m pytest --quiet --durations=15 $(PYTEST_FLAGS)

# Optional: what other libraries test of their losses, run on ours. Their sources go to $(VENV)/peers.
test-peers: $(VENV)/.peers
	@$(VENV)/bin/python -m tests.peers $(VENV)/peers

check: $(VENV)/.test
	$(VENV)/bin/ruff check
	$(VENV)/bin/ruff format --check
	$(VENV)/bin/mypy

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo 'fastssl needs Python 3.11 or newer: make PYTHON=/path/to/python3.11'; exit 1; }
	@$(PYTHON) -m venv $(VENV) \
	  || { rm -rf $(VENV); echo 'no venv module: on Debian, apt-get install python3-venv python3-pip'; exit 1; }

$(VENV)/.core: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install --constraint constraints.txt --editable .
	@touch $@

$(VENV)/.test: $(VENV)/.core tests/system_packages.sh
	$(PIP) install --constraint constraints.txt --editable '.[test,dali]'
	@if sh tests/system_packages.sh; then \
	  $(PIP) install --constraint constraints.txt --editable '.[ffcv]'; \
	elif [ -n "$$CI" ]; then exit 1; fi
	@touch $@

$(VENV)/.peers: $(VENV)/.test tests/peers/requirements.txt
	@rm -rf $(VENV)/peers
	$(PIP) download --no-deps --require-hashes --requirement tests/peers/requirements.txt --dest $(VENV)/peers
	@for file in $(VENV)/peers/*.tar.gz; do tar -xzf $$file -C $(VENV)/peers || exit 1; done
	@touch $@

clean:
	rm -rf $(VENV) *.egg-info build .pytest_cache .mypy_cache .ruff_cache
