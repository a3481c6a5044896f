# Everything runs inside .venv, which the first target that needs it creates. PYTHON picks the interpreter that creates it:
#   make test PYTHON=python3.12
PYTHON ?= python3
# Worker processes of the test suite; "auto" has one for each core.
WORKERS ?= auto

VENV := .venv
INSTALLED := $(VENV)/.installed
RUN := $(VENV)/bin/python
LATEST := results/toy_convergence/latest
# The losses of theory.md's section 5 side by side.
FAMILY := minimisers off_policy compute family
# Where the statements stop holding: experiments of its section 4.
BOUNDARIES := spurious_minima mixture_data transition_noise uncovered_actions coverage_horizon frozen_value calibrated_start conditioning

# Figures are files; no window is ever opened.
export MPLBACKEND := Agg

.DEFAULT_GOAL := help
.PHONY: help venv verify test figures bench experiments wheel constraints clean

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 20

venv: $(INSTALLED)  ## create .venv and install the package and its tools, every version pinned

# pip and setuptools come first and are pinned too, so that the build uses the pinned ones instead of an isolated newest.
# A folder that holds no working environment (interrupted, or moved here) is made anew.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "tbrm_theory needs Python 3.11 or newer, and '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || echo missing)." >&2; \
	  echo "Name another one: make $(or $(MAKECMDGOALS),venv) PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(RUN) -m pip install --quiet --constraint constraints.txt --upgrade pip setuptools
	$(RUN) -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable '.[test,dev,cluster,llm]'
	@touch $@

# The experiment's tensors are small: a second thread only gets in the way of what else the machine does.
verify: venv  ## check every claim, run the convergence experiment, draw its figure
	@mkdir -p results
	$(VENV)/bin/tbrm verify --json results/claims.json
	OMP_NUM_THREADS=1 $(RUN) experiments/toy_convergence.py
	@$(RUN) paper_figs/fig_toy_convergence.py --results $(LATEST) --data $(LATEST) --out $(LATEST)
	@echo "The claims are in results/claims.json; results, table and figure of the experiment in $(LATEST)/"

# One torch thread for each worker: more would fight over the same cores. A file's tests go to one worker, which makes the fixtures that
# they share once; tests/conftest.py says which files come first.
test: venv  ## lint, types, and the whole test suite with its coverage
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --cov --cov-report=term --cov-fail-under=95

figures: venv  ## redraw every figure from the committed tables, running nothing
	@set -e; for figure in paper_figs/fig_*.py; do $(RUN) "$$figure"; done

bench: venv  ## measure the throughput of solving, sampling and minimising
	$(RUN) experiments/bench.py

experiments: venv  ## every experiment in full size, and what is committed of them
	$(RUN) experiments/toy_convergence.py --full
	@$(RUN) paper_figs/fig_toy_convergence.py --results $(LATEST)
	@set -e; for name in $(BOUNDARIES) $(FAMILY); do $(RUN) experiments/$$name.py; \
	  $(RUN) paper_figs/fig_$$name.py --results results/$$name/latest; done
	$(RUN) experiments/tightness.py
	@$(RUN) paper_figs/fig_tightness.py --results results/tightness/latest
	$(RUN) experiments/llm_run.py --config experiments/configs/exact_cpu.yaml
	@$(RUN) paper_figs/fig_exact_cpu.py --results results/exact_cpu/latest
	$(RUN) experiments/llm_run.py --config experiments/configs/arithmetic_cpu.yaml
	@$(RUN) paper_figs/fig_llm_run.py --results results/llm_run/latest
	$(RUN) experiments/lm_head.py
	@$(RUN) paper_figs/fig_lm_head.py --results results/lm_head/latest

wheel: venv  ## build dist/*.whl and dist/*.tar.gz
	$(RUN) -m build --no-isolation

# Use the oldest supported Python, so that each pin exists for all. To change torch, change its line and run this.
constraints:  ## find the newest versions that fit together, and pin them in constraints.txt
	$(PYTHON) -m venv --clear build/pins
	grep '^torch==' constraints.txt > build/pins/torch.txt
	build/pins/bin/python -m pip install --quiet --constraint build/pins/torch.txt --upgrade pip setuptools
	build/pins/bin/python -m pip install --quiet --constraint build/pins/torch.txt --no-build-isolation --editable '.[test,dev,cluster,llm]'
	build/pins/bin/python -m pip freeze --all --exclude-editable > build/pins/frozen.txt
	grep '^#' constraints.txt > build/pins/constraints.txt
	grep '==' build/pins/frozen.txt | sed 's/+[^+]*$$//' >> build/pins/constraints.txt
	mv build/pins/constraints.txt constraints.txt
	rm -r build/pins

clean:  ## remove build products and caches; keeps .venv and results/
	rm -rf build dist htmlcov *.egg-info .coverage .coverage.* .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -not -path './.venv/*' -prune -exec rm -r {} +
