# `make demo` and `make test` need nothing but Python: the first call installs into .venv.
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
RUN = HF_HUB_DISABLE_TELEMETRY=1 $(VENV)/bin/python

.PHONY: demo test test-min lint bench hub-kernel clean

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

# The Hub's `kernels` library, in a folder that only the test of the Hub kernel looks into: where transformers finds it, it
# takes other ways. Its other requirements are here already, or serve its check of signatures.
$(VENV)/kernels-lib: $(VENV)/installed
	rm -rf $@ $@.part
	$(VENV)/bin/python -m pip install --quiet --no-deps --constraint $(CONSTRAINTS) --target $@.part \
		kernels kernels-data tomlkit
	mv $@.part $@

# Worksteal keeps a file on one worker as long as it can: what its tests share is made once.
test: $(VENV)/installed $(VENV)/hf-sdist $(VENV)/kernels-lib
	HF_SDIST=$(CURDIR)/$(VENV)/hf-sdist KERNELS_LIB=$(CURDIR)/$(VENV)/kernels-lib $(RUN) -m pytest -n 2 --dist worksteal

# The oldest transformers that setup.cfg admits.
test-min:
	$(MAKE) test VENV=.venv-min CONSTRAINTS=constraints-min.txt

lint: $(VENV)/installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

bench: $(VENV)/installed
	$(RUN) examples/benchmark_cpu.py

# The folder to upload as a kernel repository; `kernels` picks the build by the name of its folder.
hub-kernel:
	rm -rf build/hub-kernel
	mkdir -p build/hub-kernel/build/torch-cuda
	cp kernels/README.md kernels/build.toml LICENSE build/hub-kernel
	cp kernels/torch-ext/based_kernels/*.py kernels/torch-ext/based_kernels/metadata.json \
		build/hub-kernel/build/torch-cuda

clean:
	rm -rf $(VENV) .venv-min build *.egg-info src/*.egg-info
