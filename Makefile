# make demo    install, run the main job on the embedded pipeline, print where its page is
# make test    install, lint, type-check, import contracts, tests; with THREADS=2 torch has two threads in each of two processes
# make docs    the guides and the API reference as a site that needs no network: build/site/index.html
# make bench   the ops against dense PyTorch and other libraries on this machine, ten minutes: bench/results/
# make peers   the other libraries, in an environment of their own, which make bench then uses
# make interop  other programs' SAE files made again by those programs, and compared: docs/interop.md
# make matrix  every promise of attach in every configuration, over half an hour: docs/pipelines.md
# make floor   the oldest supported versions, in an environment of their own: docs/pipelines.md too
# make card    what a GPU machine will do, rehearsed with the Triton it has: kernels compiled, every op interpreted; up to an hour
# make evaluate  the EmojiCanvas benchmark: bench/results/emoji.json

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

# Python 3.10 has its own: the newest diffusers, numpy and scipy no longer run there.
CONSTRAINTS := constraints$(shell $(PYTHON) -c 'import sys; print("-3.10" if sys.version_info < (3, 11) else "")').txt

PEERS ?= .venv-peers
FLOOR ?= .venv-floor
CARD ?= .venv-card
ORBAX ?= .venv-orbax
# What measures: the environment with the other libraries where there is one.
MEASURE = $(if $(wildcard $(PEERS)/.installed),$(PEERS)/bin,$(BIN))/python

.PHONY: demo test lint types contracts pytest docs matrix floor card bench peers interop evaluate tables browser clean

$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and pinned: an unpinned one may replace it with another build.
$(VENV)/.installed: $(VENV)/.made pyproject.toml setup.cfg setup.py $(CONSTRAINTS)
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) torch
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e .
	touch $@

$(VENV)/.tests-installed: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[test,explore,bench,data]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/sparsefeat demo --out demo --force

test: lint types contracts pytest

lint: $(VENV)/.tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.tests-installed
	$(BIN)/mypy

contracts: $(VENV)/.tests-installed
	$(BIN)/lint-imports

# Two processes of one thread each: the tests' models are so small that a second thread only waits. THREADS=2 tries it.
THREADS ?= 1
pytest: $(VENV)/.tests-installed
	OMP_NUM_THREADS=$(THREADS) MKL_NUM_THREADS=$(THREADS) OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -rs -n 2 --dist loadfile --no-loadscope-reorder \
		--durations=10

docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --quiet --strict
	$(BIN)/python tools/check_site.py build/site

$(VENV)/.docs-installed: $(VENV)/.tests-installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) -e '.[docs]'
	touch $@

# The results are taken whether or not every promise was kept: the page says which were not.
matrix: $(VENV)/.tests-installed build/quantised/.installed
	mkdir -p build
	PYTHONPATH=build/quantised MATRIX=full MATRIX_RESULTS=build/matrix-newest.json $(BIN)/python -m pytest -q \
		tests/pipeline/test_matrix*.py tests/pipeline/test_quantised.py; \
	failed=$$?; $(BIN)/python tools/write_pipelines.py --take newest build/matrix-newest.json; exit $$failed

# Beside the environment: diffusers imports them wherever they are installed.
build/quantised/.installed: $(CONSTRAINTS) $(VENV)/.installed
	$(BIN)/python -m pip install --quiet -c $(CONSTRAINTS) --no-deps --target build/quantised torchao bitsandbytes gguf
	touch $@

floor: $(FLOOR)/.installed
	mkdir -p build
	MATRIX_RESULTS=build/matrix-floor.json $(FLOOR)/bin/python -m pytest -q tests/pipeline tests/sae tests/kernels \
		--ignore-glob='tests/kernels/test_ahead_of_time*'; \
	failed=$$?; $(FLOOR)/bin/python tools/write_pipelines.py --take floor build/matrix-floor.json; exit $$failed

# torch first and pinned, as above.
$(FLOOR)/.installed: constraints-floor.txt
	$(PYTHON) -m venv $(FLOOR)
	$(FLOOR)/bin/python -m pip install --quiet -c constraints-floor.txt torch
	$(FLOOR)/bin/python -m pip install --quiet -c constraints-floor.txt -e .
	$(FLOOR)/bin/python -m pip install --quiet -c constraints-floor.txt accelerate ftfy hypothesis peft pytest pytest-benchmark scipy
	touch $@

card: $(CARD)/.installed
	AHEAD_OF_TIME=full OMP_NUM_THREADS=1 $(CARD)/bin/python -m pytest -q tests/kernels/test_ahead_of_time*.py tests/bench/test_predict.py
	$(CARD)/bin/python -m bench.predict
	$(CARD)/bin/python -m bench.gpu smoke --rehearse --out build/card

# torch first and pinned, as above. Without diffusers and transformers: the machines have none.
$(CARD)/.installed: constraints-card.txt
	$(PYTHON) -m venv $(CARD)
	$(CARD)/bin/python -m pip install --quiet -c constraints-card.txt torch triton numpy
	$(CARD)/bin/python -m pip install --quiet -c constraints-card.txt \
		hypothesis huggingface_hub matplotlib pillow pytest pytest-benchmark pyyaml safetensors
	$(CARD)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

bench: $(VENV)/.tests-installed
	$(MEASURE) -m bench.run
	$(MEASURE) -m bench.busy
	$(MEASURE) -m bench.training

peers: $(PEERS)/.installed

# torch first and pinned, as above; torchvision comes along with these and is built for another build of torch, which
# breaks every import of transformers. daam asks for diffusers 0.21, and runs with a newer one.
$(PEERS)/.installed: constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt torch
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt eai-sparsify sae-lens dictionary-learning overcomplete
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt diffusers matplotlib pytest pytest-benchmark typer
	$(PEERS)/bin/python -m pip install --quiet --no-deps attention-map-diffusers==1.0.0 daam==0.2.0
	$(PEERS)/bin/python -m pip install --quiet -c constraints.txt spacy inflect joblib numba scikit-image
	$(PEERS)/bin/python -m pip install --quiet --no-deps -e .
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# FLUX SAEs are JAX's: their fixtures are written in an environment of their own.
$(ORBAX)/.installed: constraints.txt
	$(PYTHON) -m venv $(ORBAX)
	$(ORBAX)/bin/python -m pip install --quiet -c constraints.txt torch
	$(ORBAX)/bin/python -m pip install --quiet -c constraints.txt orbax-checkpoint 'jax[cpu]' safetensors pyyaml
	$(ORBAX)/bin/python -m pip install --quiet --no-deps -e .
	touch $@

interop: $(PEERS)/.installed $(ORBAX)/.installed
	$(PEERS)/bin/python -m tools.interop.run --orbax $(ORBAX)/bin/python
	$(PEERS)/bin/python tools/write_interop.py

evaluate: $(VENV)/.installed
	$(BIN)/sparsefeat evaluate emoji

tables: $(VENV)/.installed
	$(BIN)/python tools/write_tables.py

# A browser for the tests that look at the page; without one they are skipped by name.
browser:
	command -v chromium >/dev/null || command -v google-chrome >/dev/null || \
	{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

clean:
	rm -rf $(VENV) $(PEERS) $(FLOOR) $(CARD) $(ORBAX) build/lib build/site dist demo *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
