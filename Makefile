# Two commands are all a new machine needs: `make demo` and `make test`. Everything is installed in .venv and cached there.

PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DOCTEST := $(VENV)/debian/usr
INSTALLED := $(VENV)/installed
DYNAMO := $(VENV)/dynamo/unpacked
OBSERVERS := $(VENV)/observers
TWINE := $(VENV)/twine/bin/twine
AUDIT := $(VENV)/audit/bin/python
IMPORTED := $(VENV)/transformers-tests
PINS := $(patsubst %,--constraint tools/%.txt,constraints locked locked_separate)
MINIMUM := .venv-minimum
VLLM_RELEASES ?= 0.28.0 0.30.0 0.32.0 0.33.0

# Tests that need vLLM, or torchvision, which comes with it; that depend on how a later hypothesis varies damaged bytes; or
# that compare the schema and the commands' pages, which a later pydantic and typer word differently.
NOT_MINIMUM := --ignore tests/e2e --ignore tests/hostile \
	$(patsubst %,--ignore tests/%,integrations/vllm integrations/dynamo integrations/transformers plugins/bench/test_bench_encode.py \
	plugins/bench/test_bench_placement.py plugins/bench/test_bench_serve.py images/test_fitting.py) \
	-k "not damaged_bytes and not made_from_data and not tables_show"

PACKAGES := . plugins/onnxrt plugins/openvino plugins/torch_ref plugins/flexmlrt plugins/testing plugins/bench examples/digits_vlm
NATIVE := $(wildcard cpp/*.txt cpp/*/*.txt cpp/cmake/* cpp/bridge/* cpp/simulator/*.* cpp/simulator/include/*)
MANIFESTS := Makefile hatch_build.py tools/constraints.txt tools/locked.txt $(wildcard tools/vllm_cpu/*) \
	$(PACKAGES:%=%/pyproject.toml) $(NATIVE)

# Caches of every tool stay inside the environment, so that nothing is left outside the repository.
export XDG_CACHE_HOME := $(CURDIR)/$(VENV)/cache
export XDG_CONFIG_HOME := $(CURDIR)/$(VENV)/config
export HF_HOME := $(XDG_CACHE_HOME)/huggingface
export TORCHINDUCTOR_CACHE_DIR := $(XDG_CACHE_HOME)/inductor
export VLLM_CACHE_ROOT := $(XDG_CACHE_HOME)/vllm
export VLLM_CONFIG_ROOT := $(XDG_CONFIG_HOME)/vllm
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_CACHE_DIR := 1

# pip compiles none of the modules, most of which are never imported: Python does, at the first import of each.
PIP = $(BIN)/python -m pip install --no-compile
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install demo test lint types docs native observers unit unit-others unit-plugins unit-kit e2e families faults hostile audit bench dist minimum vllm-matrix transformers-tests format clean

help:
	@echo "make demo    install, then compare stock vLLM with a backend on handwritten digits"
	@echo "make test    install, then lint, type-check, build the documentation and run every test"
	@echo "make docs    install, then build the documentation into $(VENV)/site"
	@echo "make native  install, then build the C++ tests with sanitizers and run them"
	@echo "make families  compare answers of a tiny model of every architecture, with each backend in each mode (minutes)"
	@echo "make hostile read more than 10,000 hostile files and fuzz every reader, in a few minutes"
	@echo "make audit   ask an advisory service for known vulnerabilities of what is installed, if one can be reached"
	@echo "make faults  install, then plant faults behind real vLLM servers (ten minutes)"
	@echo "make bench   install, then run the benchmarks (random weights of the 7B tower's shape; minutes)"
	@echo "make dist    build the distributions for publishing into dist/, check them and install them once"
	@echo "make minimum run the unit tests that need no vLLM on the lowest versions allowed, in .venv-minimum"
	@echo "make vllm-matrix  compare answers on other releases of vLLM (VLLM_RELEASES=\"$(VLLM_RELEASES)\")"
	@echo "make transformers-tests  run transformers' own tests, from TRANSFORMERS=checkout, with encoders as vision towers"
	@echo "make clean   remove .venv and every cache"

install: $(INSTALLED)

$(INSTALLED): $(MANIFESTS)
	@echo "==> virtual environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(PIP) --quiet --constraint tools/constraints.txt pip
	@echo "==> vLLM for the CPU and the development tools (a minute or more)"
	$(MAKE) --jobs=2 --output-sync=line pinned-constraints pinned-locked
	@echo "==> this repository's distributions, editable, built with the tools that are installed"
	$(PIP) --no-deps --no-build-isolation ./tools/vllm_cpu $(PACKAGES:%=--editable ./%)
	@touch $@

# Two at a time, for two cores. Nothing is resolved: the two files are complete, and have no distribution in common.
pinned-%:
	$(PIP) --no-deps --requirement tools/$*.txt

demo: $(INSTALLED)
	$(BIN)/visionaccel demo

# Two targets at a time, for two cores. What the tests need is made first: make begins a target that has to wait for something
# after all others, and the longest must begin first. Finally, the results are compared with those on the pages.
test: $(INSTALLED)
	$(MAKE) --jobs=2 --output-sync=line types lint native docs observers $(DYNAMO)
	$(MAKE) --jobs=2 --output-sync=line e2e unit-others unit-kit unit-plugins
	$(BIN)/python tools/evidence.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-cache
	$(BIN)/bandit --quiet --configfile pyproject.toml --recursive src $(wildcard plugins/*/visionaccel_*) examples benchmarks tools
	$(BIN)/python tools/check_pins.py
	$(BIN)/python tools/check_words.py

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/mypy examples/disaggregated examples/embeds_client

# The site of the repository's pages, without a network; a warning is an error. Its start page is docs/index.html.
docs: $(INSTALLED)
	$(BIN)/sphinx-build --quiet --fail-on-warning --keep-going -c docs -d $(VENV)/doctrees . $(VENV)/site

# The C++ tests run with sanitizers. ThreadSanitizer cannot start if the kernel randomises addresses more than it expects;
# setarch turns this off where a container allows it. doctest is taken from the system, or unpacked from Debian's package.
native: $(INSTALLED)
	@test -e /usr/include/doctest/doctest.h || test -e $(DOCTEST)/include/doctest/doctest.h || { \
		mkdir -p $(VENV)/debian && cd $(VENV)/debian && \
		{ apt-get download --quiet doctest-dev || { apt-get update --quiet && apt-get download --quiet doctest-dev; } } && \
		dpkg --extract doctest-dev_*.deb . ; } || { echo "The C++ tests need doctest (Debian: doctest-dev)."; exit 1; }
	$(BIN)/cmake -S cpp -G Ninja -B $(VENV)/native -D CMAKE_BUILD_TYPE=Debug -D VISIONACCEL_PYTHON=OFF -D VISIONACCEL_TESTS=ON \
		-D VISIONACCEL_WERROR=ON -D CMAKE_PREFIX_PATH=$(abspath $(DOCTEST)) -D Python_EXECUTABLE=$(abspath $(BIN))/python \
		> $(VENV)/native.log || { cat $(VENV)/native.log; exit 1; }
	$(BIN)/cmake --build $(VENV)/native
	$$(setarch -R true 2> /dev/null && echo setarch -R) $(BIN)/ctest --test-dir $(VENV)/native --output-on-failure

# Programs that tests use: Prometheus, unpacked from Debian's package, and a browser, installed if the user is root. The
# tests of a program that is missing are skipped.
observers: $(OBSERVERS)

$(OBSERVERS): | $(INSTALLED)
	@command -v prometheus > /dev/null || test -e $(DOCTEST)/bin/prometheus || { mkdir -p $(VENV)/debian && cd $(VENV)/debian && \
		{ apt-get download --quiet prometheus || { apt-get update --quiet && apt-get download --quiet prometheus; } } && \
		dpkg --extract prometheus_*.deb . ; } || echo "The dashboard's tests need Prometheus (Debian: prometheus)."
	@command -v chromium > /dev/null || { test $$(id -u) = 0 && { apt-get install --quiet --yes --no-install-recommends chromium || \
		{ apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends chromium; } } > $(VENV)/chromium.log 2>&1 ; } \
		|| echo "The report's tests need a browser (Debian: chromium)."
	@touch $@

# Next to what is installed; tools/locked_dynamo.txt says why.
$(DYNAMO): tools/locked_dynamo.txt | $(INSTALLED)
	rm -rf $(@D)
	$(PIP) --quiet --no-deps --target $(@D) --requirement $<
	@touch $@

UNIT = TESTS_BROWSER=$$(command -v chromium > /dev/null && echo 1) $(BIN)/python -m pytest --durations=25
PLUGINS := $(filter-out tests/plugins/testing,$(wildcard tests/plugins/*)) tests/towers

# Threads of torch sleep while they wait. By default they keep a core busy, which other processes need here.
unit-others unit-plugins unit-kit e2e: export OMP_WAIT_POLICY := PASSIVE

# In parts, which `test` runs next to each other.
unit: unit-others unit-plugins unit-kit

unit-others: $(OBSERVERS) $(DYNAMO)
	$(UNIT) --ignore tests/e2e --ignore tests/plugins --ignore tests/towers --junitxml=$(VENV)/results/unit.xml

# With the tests of towers, because both use the blocks of the 7B tower, which take long to make.
unit-plugins: $(OBSERVERS)
	$(UNIT) $(PLUGINS) --basetemp=.pytest_tmp_plugins --junitxml=$(VENV)/results/plugins.xml

unit-kit: $(INSTALLED)
	rm -rf $(VENV)/conformance
	$(UNIT) tests/plugins/testing --visionaccel-report=$(VENV)/conformance --basetemp=.pytest_tmp_kit --junitxml=$(VENV)/results/kit.xml

e2e: $(INSTALLED)
	$(BIN)/python -m pytest tests/e2e --basetemp=.pytest_tmp_e2e --junitxml=$(VENV)/results/e2e.xml --durations=25

# Writes what `make e2e` shows for some of the models and backends.
families: $(INSTALLED)
	PYTHONPATH=tests/support:tests/e2e $(BIN)/python tests/e2e/families.py docs/families.json

# Plants every fault of the suite behind real servers, in about ten minutes. `make e2e` plants some of them.
faults: $(INSTALLED)
	$(BIN)/visionaccel faults --output $(VENV)/faults.json

hostile: $(INSTALLED)
	PYTHONPATH=tests/support:tests $(BIN)/python -m hostile

# In a separate environment, as for `dist` below.
$(AUDIT): tools/constraints.txt tools/locked.txt tools/locked_separate.txt | $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/audit
	$(AUDIT) -m pip install --quiet $(PINS) pip-audit
	@touch $@

audit: $(INSTALLED) $(AUDIT)
	$(AUDIT) tools/audit.py $(VENV)/lib/python3.11/site-packages

bench: $(INSTALLED)
	$(BIN)/python -m benchmarks

# In a separate environment, because twine has many dependencies that nothing else here needs.
$(TWINE): tools/constraints.txt tools/locked.txt tools/locked_separate.txt | $(INSTALLED)
	$(PYTHON) -m venv $(VENV)/twine
	$(VENV)/twine/bin/python -m pip install --quiet $(PINS) twine
	@touch $@

dist: $(INSTALLED) $(TWINE)
	$(BIN)/python tools/distributions/run.py $(abspath $(TWINE))

# Installed as users install them, not editable, and built with the lowest versions of the build tools.
minimum:
	$(PYTHON) -m venv --clear $(MINIMUM)
	$(MINIMUM)/bin/python -m pip install --no-compile --constraint tools/minimum.txt --requirement tools/minimum_requirements.txt
	$(MINIMUM)/bin/python -m pip install --no-compile --constraint tools/minimum.txt --no-build-isolation \
		--config-settings=build-dir=$(CURDIR)/$(MINIMUM)/build $(PACKAGES:%=./%)
	$(MINIMUM)/bin/python -m pytest $(NOT_MINIMUM) --basetemp=.pytest_tmp_minimum

vllm-matrix:
	$(PYTHON) tools/vllm_matrix/run.py $(VLLM_RELEASES)

# What transformers' tests import and nothing else needs, in a separate folder.
$(IMPORTED): tools/constraints.txt tools/locked.txt tools/locked_separate.txt | $(INSTALLED)
	$(PIP) --quiet --no-deps $(PINS) --upgrade --target $@ datasets multiprocess pandas parameterized pyarrow xxhash
	@touch $@

transformers-tests: $(INSTALLED) $(IMPORTED)
	PYTHONPATH=$(abspath $(IMPORTED)) $(BIN)/python tools/transformers_tests/run.py $(TRANSFORMERS)

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(MINIMUM) .venv-vllm-* .pytest_cache .pytest_tmp* .mypy_cache .ruff_cache .hypothesis
