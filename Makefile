# make demo | test | check | bench | gpu. Every target sets up its own environment in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test check bench gpu index clean

demo: $(READY)
	$(PY) -m apps.demo

test: $(READY)
	$(PY) -m pytest

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m benchmarks.tables --check
	$(PY) -m pytest tests/test_layout.py tests/accel/test_compat.py -q

# The slow studies: full conformance matrix, random kills, figures of README. About an hour on two cores.
bench: $(READY)
	$(PY) -m pytest -m slow
	$(PY) -m benchmarks.bench_overhead
	$(PY) -m benchmarks.bench_native
	$(PY) -m benchmarks.bench_kill
	$(PY) -m benchmarks.tables

# The same on a machine with an accelerator: figures go to benchmarks/results/ under its name.
gpu: $(READY)
	$(PY) -c "import torch, sys; sys.exit(not torch.cuda.is_available())"
	$(PY) -m pytest -m "slow or not slow" tests/accel tests/caches tests/samplers
	$(PY) -m benchmarks.bench_overhead --device cuda
	$(PY) -m benchmarks.bench_native --device cuda
	$(PY) -m benchmarks.tables

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf demo out .pytest_cache .ruff_cache .hypothesis
