# `make demo` and `make test` need nothing but Python: the first call installs into .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = HF_HUB_DISABLE_TELEMETRY=1 $(VENV)/bin/python

.PHONY: demo test test-min lint bench clean

$(VENV)/installed: setup.cfg pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[dev]"
	touch $@

demo: $(VENV)/installed
	$(RUN) examples/quickstart.py

# transformers' own model tests come with its source distribution only.
$(VENV)/hf-sdist: $(VENV)/installed
	rm -rf $@ $@.download && mkdir $@.download
	$(VENV)/bin/python -m pip download --quiet --no-deps --no-binary transformers --no-build-isolation \
		--dest $@.download --constraint $(CONSTRAINTS) transformers
	mkdir $@ && tar -xzf $@.download/*.tar.gz --strip-components 1 -C $@
	rm -rf $@.download

test: $(VENV)/installed $(VENV)/hf-sdist
	HF_SDIST=$(CURDIR)/$(VENV)/hf-sdist $(RUN) -m pytest -n 2

# The oldest transformers that setup.cfg admits.
test-min:
	$(MAKE) test VENV=.venv-min CONSTRAINTS=constraints-min.txt

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	$(RUN) examples/benchmark_cpu.py

clean:
	rm -rf $(VENV) .venv-min build *.egg-info src/*.egg-info
