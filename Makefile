# `make` lists what can be done. All of it happens inside .venv; nothing else on this machine is changed.
SHELL      := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.NOTPARALLEL:
.DEFAULT_GOAL := help

PYTHON  ?= $(shell command -v python3.11 || command -v python3)
VENV    ?= .venv
FOLDER  ?= runs/quickstart
WORKERS ?= 2
MARK    ?= not slow and not gpu
# How pytest-xdist divides the tests: a file stays with one worker, which makes its fixtures once.
DIST    ?= --dist loadfile --no-loadscope-reorder
ARGS    ?=
BIN     := $(VENV)/bin
# The stamp's name holds a checksum of the files that decide what is installed.
SUM     := $(shell cat settings.ini setup.py | cksum | cut -d' ' -f1)
RUN     := $(VENV)/.run-$(SUM)
DEV     := $(VENV)/.dev-$(SUM)

.PHONY: help run lab test in-step lint nbtest tutorials docs pytest bench clean distclean

help:  ## this list
	@echo 'effdet_nb. Needs make and Python 3.11 or later; the rest goes into $(VENV).'
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | sort -s -k1,1 | awk -F'\t' '{printf "  make %-10s %s\n", $$1, $$2}'

run: $(RUN)  ## from nothing to a trained, pruned, exported detector and its report, on drawn images (minutes)
	@echo 'make run: the whole pipeline on drawn shapes, into $(FOLDER)/. Started again, it goes on where it stopped.'
	@$(BIN)/effdet_quickstart --folder '$(FOLDER)' $(ARGS)
	@echo 'report: $(abspath $(FOLDER))/report.html'

lab: $(DEV)  ## the chapters in JupyterLab, to read, run and edit
	@$(BIN)/jupyter lab --notebook-dir nbs $(ARGS)

test: in-step lint nbtest docs pytest  ## notebooks and modules in step, ruff, chapters, docs site, the tests that are not slow
in-step: $(DEV)  ## nbdev_export and nbdev_clean change nothing
	@state() { find nbs effdet_nb \( -name '*.ipynb' -o -name '*.py' \) -not -path '*/.ipynb_checkpoints/*' -exec cksum {} + | sort; }; \
	before=$$(state); $(BIN)/nbdev_export; $(BIN)/nbdev_clean; after=$$(state); \
	[ "$$before" = "$$after" ] && echo 'in step: notebooks are clean, and modules say what notebooks say' || \
	{ echo 'These files were not in step; now they are. Look at them and commit:'; diff <(echo "$$before") <(echo "$$after") | awk '/^[<>]/ {print "  " $$4}' | sort -u; exit 1; }

lint: $(DEV)  ## ruff over modules, tests, benchmarks, tools and the cells of notebooks, seconds
	@$(BIN)/ruff check --quiet && echo 'ruff: nothing to mend'

nbtest: $(DEV)  ## run the chapters and the short tutorials, and find kept outputs that are not those of today's code
	@failed=0; \
	$(NBTEST_COMPARE) --skip_folder_re '^[_.]|^($(TRAINING_PARTS)|tutorials)$$' || failed=1; \
	$(NBTEST_COMPARE) --path nbs/tutorials --file_re '^($(FIXED_TUTORIALS))\.' || failed=1; \
	$(NBTEST) --skip_folder_re '^[_.]|^($(OTHER_PARTS)|tutorials)$$' --skip_file_re '^([_.]|index\.ipynb|($(LONG_CHAPTERS))\.)' || failed=1; \
	exit $$failed

tutorials: $(DEV)  ## run the tutorials and chapters that train networks for long, minutes
	@$(NBTEST) --path nbs/tutorials --skip_file_re '^([_.]|($(FIXED_TUTORIALS))\.)'
	@$(NBTEST) --file_re '^($(LONG_CHAPTERS))\.'

docs: $(DEV)  ## the site, offline, into _docs/
	@$(BIN)/python tools/render_docs.py
	@echo 'docs: $(CURDIR)/_docs/index.html'

pytest: $(DEV)  ## the tests in tests/; all of them with MARK=
	@TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python -m pytest -n $(WORKERS) $(DIST) -m '$(MARK)' --durations=20 $(ARGS)

# Those that need arguments are listed in bench/README.md; the others run here.
NEED_ARGUMENTS := interleave peer_effdet peer_learning own_learning learning recipe mobile inference parity
bench: $(DEV)  ## speed and memory, beside other implementations
	@for script in $(filter-out $(NEED_ARGUMENTS:%=bench/%.py), $(wildcard bench/*.py)); do echo "# $$script"; TF_CPP_MIN_LOG_LEVEL=2 $(BIN)/python $$script; done

clean:  ## remove what was built, but not .venv and not your runs
	@rm -rf _docs _proc _shots jupyter_execute build dist .pytest_cache .hypothesis nbs/nbdev.yml nbs/sidebar.yml
	@find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean  ## remove .venv and the quickstart's run as well
	@rm -rf '$(VENV)' '$(FOLDER)' effdet_nb.egg-info

# The environment. What is there and good enough stays as it is.
$(BIN)/python:
	@test ! -e '$(VENV)' || { echo '$(VENV) exists, but it is no Python environment. Move it away, or name another: make run VENV=folder' >&2; exit 1; }
	@test -n '$(PYTHON)' && '$(PYTHON)' -c 'import sys; sys.exit(sys.version_info < (3,11))' || \
	{ echo '$(or $(PYTHON),python3): Python 3.11 or later is needed. Install it, or name it: make run PYTHON=/path/to/python3.11' >&2; exit 1; }
	@echo "making $(VENV) with $$('$(PYTHON)' --version)"
	@'$(PYTHON)' -m venv '$(VENV)' || { rm -rf '$(VENV)'; echo 'Python came without venv; on Debian and Ubuntu it is in the package python3-venv' >&2; exit 1; }

$(RUN): | $(BIN)/python
	@test -e $(DEV) || { echo 'installing effdet_nb into $(VENV) (TensorFlow is large: minutes the first time)'; $(call install,.); }
	@touch $@

$(DEV): | $(BIN)/python
	@echo 'installing effdet_nb and what its tests and docs need into $(VENV) (minutes the first time)'
	@$(call install,.[dev])
	@touch $@

NBTEST = $(NBTEST_ENV) $(BIN)/nbdev_test $(NBTEST_OPTIONS)
# The same, with a shell that also compares the text that cells give with the text that notebooks keep.
NBTEST_COMPARE = $(NBTEST_ENV) $(BIN)/python tools/check_outputs.py $(NBTEST_OPTIONS)
NBTEST_ENV     = OMP_NUM_THREADS=1 TF_CPP_MIN_LOG_LEVEL=2 TF_ENABLE_ONEDNN_OPTS=1
NBTEST_OPTIONS = --timing --n_workers $(WORKERS)
# Chapters of the first list train networks, and numbers of a training may depend on the processor.
TRAINING_PARTS = detector|train|export
LONG_CHAPTERS  = 12_fit|13_overfit|14_first_fit
# Tutorials whose outputs do not come from a training.
FIXED_TUTORIALS = coming_from_tao|deploy|raspberry_pi|reading_a_report
OTHER_PARTS    = core|accel|data|evaluate|weights|prune|app|reference

# Compiling once saves seconds at every start of TensorFlow; the files that do not compile are templates inside packages.
install = PIP_DISABLE_PIP_VERSION_CHECK=1 $(BIN)/python -m pip install -q -e '$(1)' && \
	{ $(BIN)/python -m compileall -q -j 0 "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" > /dev/null 2>&1 || true; }
