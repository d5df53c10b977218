# `make` lists the verbs. Each makes .venv when it is missing; python3, git and make are all it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.installed
OLDEST := .venv-oldest
export HF_HUB_OFFLINE ?= 1

.PHONY: help quickstart demo test test-oldest lint timm-suite embedded bench bench-full pictures docs clean

help:  ## list the verbs
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 14

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable ".[multimodal,train,export,demo,docs,dev]"
	@# without its CUDA kernels, which take hours to build; what it is measured and tested against on the CPU
	-CUDA_VISIBLE_DEVICES= $(BIN)/python -m pip install --quiet --no-build-isolation --no-deps "natten>=0.21"
	@touch $@

quickstart: $(READY)  ## train three backbones on real digits; one page of captions, grounding, pruning, hallucination (a few minutes)
	$(BIN)/python -m train.quickstart --output quickstart

demo: $(READY)  ## the three demos in a browser, on this machine alone
	$(BIN)/visionsel demo

test: $(READY) lint  ## lint, timm's own tests on the smallest of each architecture, then all our tests
	$(BIN)/python -m tests.timm_suite --smallest
	$(BIN)/python -m pytest --numprocesses auto --dist worksteal

$(OLDEST)/.installed: pyproject.toml
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet --upgrade pip
	$(OLDEST)/bin/python -m pip install --editable ".[multimodal,train,dev]" "transformers==5.17.*" \
		"torch==2.11.*" "torchvision==0.26.*" "numpy<2.4"  # the interpreter of its triton knows no later numpy
	@touch $@

test-oldest: $(OLDEST)/.installed  ## tests of operators and of what touches transformers, on the oldest versions supported
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist worksteal tests/ops tests/multimodal tests/embedded

lint: $(READY)  ## formatting, lint rules and types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

timm-suite: $(READY)  ## timm's own model tests, at the installed version, on every name (half an hour)
	$(BIN)/python -m tests.timm_suite

embedded: $(READY)  ## train the shipped small models again from seed and compare (about an hour on two cores)
	$(BIN)/python -m train.embedded --output runs/embedded

bench: $(READY)  ## paired timings, growth and memory, and which goals are reached (some ten minutes)
	$(BIN)/python -m benchmarks.ops --threads 1 --rounds 3
	$(BIN)/python -m benchmarks.models --threads 1 --rounds 3
	$(BIN)/python -m benchmarks.growth --threads 1 --rounds 3
	$(BIN)/python -m benchmarks.memory --threads 1
	$(BIN)/python -m benchmarks.pruning --threads 1 --rounds 1 --visual-tokens 576
	$(BIN)/python -m benchmarks.grounding --threads 1 --rounds 1 --images 1
	-$(BIN)/python -m benchmarks.targets $(foreach p,ops models growth memory,runs/bench/$(p).json)

bench-full: $(READY)  ## all of it, and the pages of docs/benchmarks (leave the machine idle)
	$(BIN)/python -m benchmarks.ops --threads 1 --backends auto compiled
	$(BIN)/python -m benchmarks.ops --threads 1 --rounds 5 --batch 8 --operators neighborhood halo \
		--out runs/bench/batches.json
	$(BIN)/python -m benchmarks.attention --threads 1
	$(BIN)/python -m benchmarks.models --threads 1 --compile
	$(BIN)/python -m benchmarks.growth --threads 1
	$(BIN)/python -m benchmarks.memory --threads 1
	$(BIN)/python -m benchmarks.pruning --threads 1
	$(BIN)/python -m benchmarks.grounding --threads 1
	$(BIN)/python -m benchmarks.tables $(foreach p,ops batches attention models growth memory pruning grounding,runs/bench/$(p).json)
	$(BIN)/python -m benchmarks.speeds runs/bench/ops.json runs/bench/models.json --write
	$(BIN)/python -m benchmarks.profiles --write

docs: $(READY)  ## the documentation as a site, in site/
	$(BIN)/python -m mkdocs build --strict

pictures: $(READY)  ## draw the pictures of the README and the docs again (the demo's needs Chromium)
	$(BIN)/python -m benchmarks.pictures
	$(BIN)/python -m tests.demos.screenshot

clean:  ## remove the environment and everything that was made
	rm -rf $(VENV) $(OLDEST) quickstart runs site build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
