# `python -m dev.workflows.demo` and `python -m benchmarks` start with this folder in front of sys.path,
# where our folder `nodes` hides the host's module `nodes`. The demo only talks HTTP to a server
# of its own; a benchmark calls dev.load.load_host() before it imports anything of the host.
PYTHON ?= python3
BIN := .venv/bin
# On all cores; tests that share a server or a browser go to one of them (xdist_group).
SIDE_BY_SIDE := -n auto --dist loadgroup

.PHONY: help setup test browser demo bench simulate fuzz lint format coverage mutation clean
.DEFAULT_GOAL := help

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: ## install the environment and the host (ComfyUI); quick when nothing has changed
	@$(PYTHON) dev/setup.py

test: lint browser ## setup, lint and all tests
	$(BIN)/python -m pytest $(SIDE_BY_SIDE)

browser: setup ## find or install a Chromium, for the tests in the graph editor
	@$(BIN)/python -m dev.host.browser

demo: setup ## run the demo; SERVE=1 leaves the server running
	SERVE=$(SERVE) $(BIN)/python -m dev.workflows.demo

bench: setup ## run the benchmarks
	$(BIN)/python -m benchmarks

simulate: setup ## FLUX.1 at its full size on pretended GPUs: what is kept where, peaks, waits, kernels
	$(BIN)/python -m benchmarks.simulate

fuzz: setup ## 100,000 hostile inputs to every parser
	$(BIN)/python -m dev.quality.fuzz

lint: setup ## check style and types
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

coverage: setup browser ## run all tests and say which branches of omini2_core they don't take
	rm -rf test_output/coverage
	$(BIN)/coverage run -m pytest $(SIDE_BY_SIDE)
	$(BIN)/coverage combine --quiet && $(BIN)/coverage report

mutation: setup ## put faults into the core and count those that tests notice (SAMPLE=N a module)
	$(BIN)/python -m dev.quality.mutation $(if $(SAMPLE),--sample $(SAMPLE))

format: setup ## fix style
	$(BIN)/ruff check --fix . && $(BIN)/ruff format .

clean: ## remove everything that make created, the environment included
	rm -rf .venv .cache demo_output test_output .pytest_cache .ruff_cache .mypy_cache .hypothesis
