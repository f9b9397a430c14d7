# Everything a developer needs; CI calls the same targets.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
DEMO   := $(VENV)/.demo
DEV    := $(VENV)/.dev
BINDINGS  := 0.3.36
GPTQMODEL := gptqmodel==7.7.0 defuser==0.0.28 pypcre==0.6.4 logbar==0.4.15 threadpoolctl==3.8.0 tokenicer==0.0.14 \
	device-smi==0.5.7 datasets==5.2.0 pyarrow==26.0.1 pandas==3.1.1 dill==0.4.1 multiprocess==0.70.19 xxhash==4.1.0 \
	torchao==0.18.0
CONVERTER := $(VENV)/converter/.of-$(BINDINGS)
# pip would compile all modules of all packages; those that are imported are compiled then, and kept (the last line).
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile --constraint constraints.txt
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo setup test test-slow test-all test-vllm test-gptqmodel test-eval check style bench models gguf-families docs clean

demo: $(DEMO)  ## the main job on the bundled model; writes demo/report.html
	rm -rf demo
	$(BIN)/alphaq demo --output demo

$(DEMO): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

setup: $(DEV) $(CONVERTER)  ## .venv with every extra and tool

$(DEV): $(DEMO)
	$(PIP) --editable '.[dev]'
	touch $@

# llama.cpp's own converter with the gguf package that belongs to it, which the tests compare with: PyPI has them as
# they are in the sources of llama.cpp's bindings only.
$(CONVERTER):
	rm -rf $(VENV)/converter
	mkdir -p $(VENV)/converter
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --no-binary :all: \
		--dest $(VENV)/converter llama-cpp-python==$(BINDINGS)
	tar -xzf $(VENV)/converter/llama_cpp_python-$(BINDINGS).tar.gz -C $(VENV)/converter --strip-components 3 \
		$(addprefix llama_cpp_python-$(BINDINGS)/vendor/llama.cpp/,convert_hf_to_gguf.py conversion gguf-py/gguf)
	rm $(VENV)/converter/*.tar.gz
	touch $@

test: setup  ## the test suite, minutes on two cores: a third process works while others wait for theirs
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m "not slow" -n 3 --dist worksteal

test-slow: setup  ## slow tests for 24 minutes; what was not begun by then is named
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --no-loadscope-reorder --minutes 24 -rs

test-all: test  ## every test, then the slow ones without a limit; forty minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -m slow -n 2 --dist loadfile --no-loadscope-reorder -rs

test-eval: setup  ## run lm-eval's tasks on quantized models; two minutes and 400 MB of disk to install
	$(PIP) --editable '.[dev,eval]'
	HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 $(BIN)/python -m pytest -q tests/evaluation/test_tasks.py tests/trials/test_paper.py

test-vllm: .venv-vllm/.installed  ## serve native checkpoints with vLLM on the CPU; twenty minutes and 4 GB of disk
	HF_HUB_OFFLINE=1 .venv-vllm/bin/python -m pytest -q -p no:cacheprovider tests/serving

.venv-vllm/.installed: scripts/vllm_venv.py pyproject.toml
	$(PYTHON) scripts/vllm_venv.py .venv-vllm
	touch $@

test-gptqmodel: setup .venv-gptqmodel/.installed  ## load what is written for GPTQModel with it; an hour, 400 MB of disk
	PYTHONPATH=.venv-gptqmodel OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q tests/engines/test_gptqmodel_families.py \
		tests/engines/test_gptqmodel.py

# Beside the packages of .venv, and without its own: it asks for other versions of torch and transformers.
.venv-gptqmodel/.installed: Makefile
	rm -rf .venv-gptqmodel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target .venv-gptqmodel $(GPTQMODEL)
	touch $@

check: setup  ## formatting, lint, types, layers
	$(BIN)/ruff format --check src tests scripts benchmarks
	$(BIN)/ruff check src tests scripts benchmarks
	$(BIN)/mypy
	$(BIN)/lint-imports

style: setup  ## apply formatting and safe fixes
	$(BIN)/ruff format src tests scripts benchmarks
	$(BIN)/ruff check --fix src tests scripts benchmarks

bench: setup  ## side by side with peers, into benchmarks/results/ and docs/research/benchmarks.md; half an hour, 45 GB of disk
	$(PIP) --editable '.[dev,bench]'
	$(BIN)/python benchmarks/run.py

models: setup  ## check every family of models and write docs/models.md; a few minutes
	PYTHONPATH=tests $(BIN)/python scripts/models_table.py

gguf-families: setup  ## quantize a GGUF file of every family of experts, and write docs/engines/gguf-families.md; minutes
	PYTHONPATH=tests OMP_NUM_THREADS=1 $(BIN)/python scripts/gguf_families.py

docs: setup  ## the documentation site, into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) .venv-vllm .venv-gptqmodel demo site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache
