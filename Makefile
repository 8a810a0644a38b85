# `make demo` and `make test` need Python 3.11 or newer and nothing else.
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all peers lint docs campaign clean

demo: .venv/.installed  ## fine-tune a small ViT on embedded photos and write demo/report.html
	$(BIN)/vitrail demo

test: .venv/.dev  ## what a contributor runs, under ten minutes
	$(BIN)/python -m pytest -m "not slow"

test-all: .venv/.dev  ## both tiers
	$(BIN)/python -m pytest

peers: .venv-peers/.installed  ## the same logits as timm and transformers, in an environment of its own
	.venv-peers/bin/python -m pytest tests/peers

lint: .venv/.dev  ## style and types
	$(BIN)/ruff check src tests benchmarks docs
	$(BIN)/ruff format --check src tests benchmarks docs
	$(BIN)/pyright --project pyproject.toml

docs: .venv/.docs  ## the documentation as a site, in site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

campaign: .venv/.dev  ## hours of faults and mutations; results go to benchmarks/results
	$(BIN)/python benchmarks/campaign.py

clean:
	rm -rf .venv .venv-peers demo runs site

.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(PIP) -e .
	touch $@

.venv/.dev: .venv/.installed
	$(PIP) -e '.[dev]'
	touch $@

.venv/.docs: .venv/.installed
	$(PIP) -e '.[docs]'
	touch $@

.venv-peers/.installed: pyproject.toml constraints.txt tests/peers/requirements.txt tests/peers/no-deps.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]' -r tests/peers/requirements.txt
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/peers/no-deps.txt
	touch $@
