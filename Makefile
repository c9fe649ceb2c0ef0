# A new clone needs nothing but Python 3.11 to 3.14: each target sets itself up in .venv, once, and again when settings.ini or constraints.txt change.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help reproduce outputs site test test-all lab check chapters export readme _readme _convert clean

VENV := .venv
BIN := $(VENV)/bin
README := README.md
# One thread a process: on a busy core torch's second thread slows it ten times and more. Parallel work runs in processes.
export OMP_NUM_THREADS := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The first Python that will do; `make reproduce PYTHON=/path/to/python3.12` names another. (The pinned packages have no wheels for 3.15.)
OK := import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do command -v $$p >/dev/null && $$p -c '$(OK)' 2>/dev/null && { echo $$p; break; }; done)

help: ## list what there is to make
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/make \1\t\2/' | expand -t 18

reproduce: $(VENV)/.train ## redo the figures and tables into figures/, with figures/report.html (ARGS="--only table2" for some of them)
	$(BIN)/m2kit reproduce $(ARGS)

outputs: $(VENV)/.train ## put what the last `make reproduce` showed into the notebooks
	$(BIN)/m2kit outputs $(ARGS)

site: $(VENV)/.site ## the book as pages in _docs/, with search, offline: chapters, exhibits, claims, API
	$(BIN)/m2kit site $(ARGS)

# Tests and chapters run in as many processes as there are cores; one that has nothing left takes over half of what waits in another.
PYTEST = $(BIN)/python -m pytest -n auto --dist worksteal --durations 20 --durations-min 5

check: $(VENV)/.test ## a minute while you write: style, export, the chapters that your change touches, then their importers
	$(BIN)/python -m pytest -q -n auto tests/test_repo.py
	$(BIN)/python -c "import sys; from m2kit.reproduce.touched import check; sys.exit(check('.'))"

test: $(VENV)/.test ## what CI checks: unit tests and every chapter, without what is marked slow or long
	$(PYTEST) $(ARGS)

test-all: $(VENV)/.all ## all of it, for an hour or more: what is slow and long too (benchmarks, other CPUs, networks)
	$(PYTEST) -m "" $(ARGS)

chapters: $(VENV)/.test ## run every chapter as its own test (exhibits are run by reproduce)
	$(PYTEST) tests/test_chapters.py $(ARGS)

# Served from the top, so that pictures and links of a notebook are within reach; without the pop-up about news.
lab: $(VENV)/.lab $(VENV)/.hooks ## open the book in JupyterLab, on its index
	@mkdir -p $(VENV)/share/jupyter/lab/settings
	@echo '{"@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": false}}' > $(VENV)/share/jupyter/lab/settings/overrides.json
	$(BIN)/jupyter lab nbs/index.ipynb $(ARGS)

export: $(VENV)/.lab ## after editing notebooks: write m2kit/, clean the notebooks, write README.md
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean
	@$(MAKE) --no-print-directory _readme

readme: $(VENV)/.base ## write README.md from nbs/index.ipynb
	@$(MAKE) --no-print-directory _readme

# What came out, and the path, are written from ledger and notebooks. Paths in the index are seen from nbs/, those in the README from the top.
_readme:
	@$(BIN)/python -c "from m2kit.reproduce.site import write_front; write_front()"
	@$(MAKE) --no-print-directory _convert

CONVERT = $(BIN)/python -m nbconvert --log-level ERROR --to markdown --stdout --TagRemovePreprocessor.enabled=True --TagRemovePreprocessor.remove_cell_tags hide
# Badges come from elsewhere: the README alone has them, the pages and JupyterLab ask nobody.
GIT := https://github.com/m2kit/m2kit
BADGES := [![tests]($(GIT)/actions/workflows/test.yml/badge.svg)]($(GIT)/actions/workflows/test.yml) [![Python 3.11 to 3.14](https://img.shields.io/badge/python-3.11%20to%203.14-blue)](settings.ini) [![Apache-2.0](https://img.shields.io/badge/licence-Apache--2.0-blue)](LICENSE) [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/m2kit/m2kit/blob/main/nbs/index.ipynb) [![Open on Binder](https://mybinder.org/badge_logo.svg)](https://mybinder.org/v2/gh/m2kit/m2kit/main?urlpath=lab/tree/nbs/index.ipynb)
_convert:
	@$(CONVERT) nbs/index.ipynb | sed -E 's#(\(|")\.\./#\1#g' \
	  | awk -v badges='$(BADGES)' '{ print } NR == 1 { printf "\n%s\n", badges }' > $(README).tmp
	@mv $(README).tmp $(README)

clean: ## remove what was built, not what was computed: .venv, _proc, _docs
	rm -rf $(VENV) _proc _docs ._docs.work build *.egg-info

# A stamp is the last thing a set-up writes, so one that was interrupted is done again. What a larger set-up contains counts as done.
SOURCES := settings.ini constraints.txt setup.py pyproject.toml
# Modules are compiled when they are first imported; most of them never are.
INSTALL = $(BIN)/python -m pip install --no-compile -c constraints.txt -e

$(VENV)/.python:
	@[ -n "$(PYTHON)" ] || { echo "m2kit needs Python 3.11, 3.12, 3.13 or 3.14, and finds none of them. Install one, or name it: make $(MAKECMDGOALS) PYTHON=/path/to/python3.12" >&2; exit 2; }
	@"$(PYTHON)" -c '$(OK)' || { echo "$(PYTHON) is absent, or no Python 3.11, 3.12, 3.13 or 3.14; name another with PYTHON=" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	@touch $@

$(VENV)/.base: $(SOURCES) | $(VENV)/.python
	@echo "Installing what the book needs into $(VENV): some minutes, once."
	$(INSTALL) .
	@touch $@

$(VENV)/.lab: $(SOURCES) | $(VENV)/.python
	$(INSTALL) '.[dev]'
	@touch $(VENV)/.base $@

$(VENV)/.site: $(SOURCES) | $(VENV)/.python
	$(INSTALL) '.[site]'
	@touch $(VENV)/.base $@

$(VENV)/.train: $(SOURCES) | $(VENV)/.python
	@echo "Installing what the exhibits need into $(VENV): some minutes, once."
	$(INSTALL) '.[train]'
	@touch $(VENV)/.base $@

$(VENV)/.test: $(SOURCES) | $(VENV)/.python
	$(INSTALL) '.[dev,train,fhir,site]'
	@touch $(VENV)/.base $(VENV)/.lab $(VENV)/.train $(VENV)/.site $@

# Ray too, for evidence on many machines.
$(VENV)/.all: $(SOURCES) | $(VENV)/.python
	$(INSTALL) '.[dev,train,fhir,cluster,site,browser]'
	@touch $(VENV)/.base $(VENV)/.lab $(VENV)/.train $(VENV)/.site $(VENV)/.test $@

# Git then merges notebooks cell by cell. The hooks call nbdev from this .venv, which need not be active.
$(VENV)/.hooks: $(VENV)/.lab
	@if git rev-parse --is-inside-work-tree >/dev/null 2>&1; then $(BIN)/nbdev_install_hooks; \
	  sed "s#driver = nbdev_merge#driver = '$(CURDIR)/$(BIN)/nbdev_merge'#" .gitconfig > .gitconfig.tmp; mv .gitconfig.tmp .gitconfig; \
	  printf '#!/bin/bash\n"%s/nbdev_trust"\n' "$(CURDIR)/$(BIN)" > "$$(git rev-parse --git-path hooks)/post-merge"; fi
	@touch $@
