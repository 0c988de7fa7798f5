# make serve    install, and serve the default model at http://localhost:8000
# make test     install with the test tools, and run the tests
# make check    what CI runs: lint, format, types, floors, tests but the slow ones (`make test` runs those too)
# make test-arm compile the native library for ARM, and test its kernels under qemu
# make test-clients  run the clients' own packages (openai, anthropic, Dify, ...), each of its pinned version; with npm
#                    the coding agents too (Codex, Claude Code, Cline, opencode)
# make bench    measure, beside llama.cpp: make bench ARGS="--llama FOLDER --model FILE.gguf"
# make docs     write the pages that are made from code

VENV ?= .venv
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)
# Where the package index has only CUDA builds of torch:
#   make test TORCH_FROM="--index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
NATIVE := CMakeLists.txt $(shell find native -type f 2>/dev/null)

serve: $(VENV)/installed
	$(BIN)/pagoda serve $(ARGS)

# Side by side, the tests of a file in one process; then those that want the machine for themselves.
# A test that fails runs once more, alone: a shared machine may miss what a clock wants.
# One thread for numpy and torch in each: those of two workers would spin for each other's cores.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
TOGETHER := --numprocesses logical --maxprocesses 4 --dist loadfile
ALONE := $(shell grep -l mark.alone tests/test_*.py)
tried = $(PYTEST) $(1) || { [ $$? = 1 ] && $(PYTEST) -m "not slow" --last-failed; }

test: $(VENV)/installed $(VENV)/test-tools
	$(if $(ARGS),$(PYTEST) $(ARGS),$(PYTEST) $(TOGETHER) -m "not alone" && $(PYTEST) $(ALONE) -m alone)

check: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(MAKE) --no-print-directory --jobs 2 types tests
	$(call tried,$(ALONE) -m "alone and not slow")

types:
	$(BIN)/python -m mypy

tests:
	$(call tried,$(TOGETHER) -m "not alone and not slow")

CLIENTS := $(VENV)/clients
OF_openai3 := openai anthropic ollama cohere langchain
OF_openai2 := openai instructor llamaindex litellm
OF_dify := dify
test-clients: $(VENV)/installed $(VENV)/test-tools $(CLIENTS)/openai3/ready $(CLIENTS)/openai2/ready $(CLIENTS)/dify/ready
	$(call with_clients,openai3)
	$(call with_clients,openai2)
	$(call with_clients,dify)
	@command -v npm >/dev/null || echo "The coding agents are left out: they come by npm, which is not here."
	@! command -v npm >/dev/null || $(MAKE) --no-print-directory test-agents

test-agents: $(VENV)/installed $(VENV)/test-tools $(CLIENTS)/agents/ready $(CLIENTS)/npm/ready
	PATH="$(abspath $(CLIENTS)/agents/node_modules/.bin):$$PATH" $(BIN)/python -m pytest tests/test_agents.py $(ARGS)
	NPM_CLIENTS="$(abspath $(CLIENTS)/npm/node_modules)" $(BIN)/python -m pytest tests/test_npm_clients.py $(ARGS)

# Their wishes for versions of each other do not agree, and they work together all the same.
$(CLIENTS)/npm/ready: tests/clients/npm.txt
	@echo "Installing the packages of $< ..."
	@mkdir -p $(@D)
	@npm install --prefix $(@D) --legacy-peer-deps --no-audit --no-fund --silent $$(cat $<)
	@touch $@

# Newer npms run no install scripts by themselves; these put the agents' own programs in their places.
$(CLIENTS)/agents/ready: tests/clients/agents.txt
	@echo "Installing the coding agents of $< ..."
	@mkdir -p $(@D)
	@npm install --prefix $(@D) --no-audit --no-fund --silent $$(cat $<)
	@cd $(@D)/node_modules && node @anthropic-ai/claude-code/install.cjs && node opencode-ai/postinstall.mjs
	@touch $@

# Their environments hold no Pagoda: what they see of it is HTTP.
with_clients = PAGODA_PYTHON=$(abspath $(BIN)/python) $(CLIENTS)/$(1)/bin/python -m pytest --confcutdir=tests/clients \
	$(OF_$(1):%=tests/clients/test_client_%.py) $(ARGS)

$(CLIENTS)/%/ready: tests/clients/%.txt | $(VENV)/bin/python
	@echo "Installing the clients of $< ..."
	@$(VENV)/bin/python -m venv $(@D)
	@$(@D)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	@touch $@

ARM_QEMU ?= $(shell command -v qemu-aarch64-static || command -v qemu-aarch64)
test-arm:
	@command -v aarch64-linux-gnu-g++ >/dev/null && test -n "$(ARM_QEMU)" || { \
		echo "This needs a cross compiler and qemu. Debian, Ubuntu: sudo apt-get install g++-aarch64-linux-gnu qemu-user-static"; exit 1; }
	cmake -S . -B build/arm -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
		-DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static
	cmake --build build/arm --parallel --target pagoda_cpu kernels_test
	$(ARM_QEMU) -cpu max build/arm/native/kernels_test neon-dotprod
	$(ARM_QEMU) -cpu cortex-a57 build/arm/native/kernels_test neon

bench: $(VENV)/installed $(VENV)/test-tools
	$(BIN)/python bench/cpu.py $(ARGS)

docs: $(VENV)/installed
	$(BIN)/python -m pagoda.cli.help > docs/configuration.md

clean:
	rm -rf $(VENV) build src/pagoda/backend/cpu/*.so

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "Pagoda needs Python 3.11 or newer: install it, or name it: make PYTHON=/path/to/python3"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Editable: after a change of Python nothing is installed again, after one of native/ only what changed is compiled.
$(VENV)/installed: $(VENV)/bin/python pyproject.toml $(NATIVE)
	@echo "Installing Pagoda into $(VENV); its CPU kernels are compiled, which takes about half a minute ..."
	@$(PIP) --editable .
	@touch $@

# torch first and alone, so that nothing else pulls another build of it. The versions are fixed, or pip searches for
# minutes for some that go together: uv pip compile pyproject.toml --extra test --universal -o tests/constraints.txt
$(VENV)/test-tools: pyproject.toml tests/constraints.txt | $(VENV)/installed
	@echo "Installing the test tools ..."
	@$(PIP) "$(TORCH)" $(TORCH_FROM)
	@$(PIP) --editable '.[test]' --constraint tests/constraints.txt
	@touch $@

.PHONY: serve test types tests test-clients test-agents test-arm check bench docs clean
.DELETE_ON_ERROR:
