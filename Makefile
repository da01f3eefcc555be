# `make demo` and `make test` need nothing but Python: the first call installs into .venv.
PYTHON ?= python3
VENV ?= .venv
RUN = HF_HUB_DISABLE_TELEMETRY=1 $(VENV)/bin/python

.PHONY: demo test test-min lint bench clean

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) examples/quickstart.py

test: $(VENV)/installed
	$(RUN) -m pytest -n 2

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	$(RUN) examples/benchmark_cpu.py

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info
