# make setup | demo | lint | test | test-distributed. Everything lives in .venv; PYTHON=/path/to/python picks the interpreter.
VENV := .venv
PY := $(VENV)/bin/python
STAMP := $(VENV)/.setup-stamp
TORCH := torch==2.13.0
TRITON := triton==3.7.1
WORKERS ?= 2

# The first interpreter that really runs, is in range and can make an environment (a pyenv shim may exist and fail).
CHECK := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	"$$p" -c '$(CHECK)' >/dev/null 2>&1 && { echo "$$p"; break; }; done)

.PHONY: setup demo lint test test-distributed clean

setup: $(STAMP)

# torch goes first and alone, so that nothing else chooses its version. A CPU build of torch does not bring triton,
# which the interpreter tests need; a CUDA build brings its own, which stays.
$(STAMP): pyproject.toml Makefile
	@test -n "$(PYTHON)" || { echo "No Python 3.11-3.13 with venv found; run: make setup PYTHON=/path/to/python" >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	$(PY) -m pip install "$(TORCH)"
	$(PY) -c "import triton" 2>/dev/null || $(PY) -m pip install "$(TRITON)"
	$(PY) -m pip install -e ".[trl,hub,bench,dev]"
	@touch $@

# Passive waiting: on a busy machine, threads that spin for each other made a step of the CPU run 20 times as long.
demo: $(STAMP)
	OMP_WAIT_POLICY=PASSIVE $(VENV)/bin/hf-moe-ep demo --output demo_output

lint: $(STAMP)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pytest -q tests/test_imports.py

# The kernels run twice: as the machine runs them (a GPU, or PyTorch's path), then on Triton's interpreter.
TEST_ENV := HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false
PYTEST = $(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal

test: lint
	TRITON_INTERPRET=1 $(PYTEST) tests/kernels/test_experts.py tests/kernels/test_routing.py tests/kernels/test_exchange.py \
		tests/kernels/test_finite.py tests/kernels/test_optim.py tests/kernels/test_replay.py \
		-k "fused or routing or sentinel or written or rank or all_finite or of_several or optim"
	$(PYTEST) --durations 25

# The larger grid of layouts, two to eight processes; on a machine with GPUs the two-rank tests use them.
test-distributed: $(STAMP)
	$(TEST_ENV) $(PY) -m pytest -n 0 -m "grid or not grid" tests/distributed --durations 25

clean:
	rm -rf $(VENV) build dist *.egg-info demo_output
