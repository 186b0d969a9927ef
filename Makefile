# `make run` and `make test` set themselves up; nothing is installed outside .venv.
PYTHON ?= python3.11
PY := .venv/bin/python
ARGS ?=
OS := $(shell uname -s)
# A run starts a dozen processes, and each would compile the thousands of files that it imports.
unexport PYTHONDONTWRITEBYTECODE

# Linux gets the pinned list with vLLM for CPU; elsewhere the engine is transformers (`hf`).
ifeq ($(OS),Linux)
REQUIREMENTS := requirements/cpu.txt
else
REQUIREMENTS := requirements/macos.txt
endif

.PHONY: setup run test unit lint format types doctor clean

setup: .venv/ready

.venv/ready: $(REQUIREMENTS) requirements/dev.txt pyproject.toml scripts/setup.sh
	sh scripts/setup.sh $(PYTHON) $(REQUIREMENTS)
	touch $@

run: setup
	$(PY) jobs/grpo_coco.py $(ARGS)

# Tests that start a Ray in two processes, all others beside them.
test: setup
	$(PY) -m pytest --numprocesses 3 --no-loadscope-reorder $(ARGS)

unit: setup
	$(PY) -m pytest tests/unit $(ARGS)

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

doctor: setup
	$(PY) -m rayrl.doctor

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
