# make demo | test | check | bench | figures | gpu. Every target sets up its own environment in .venv.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
PY := $(VENV)/bin/python
READY := $(VENV)/.ready

.PHONY: demo test check bench figures gpu clean

demo: $(READY)
	$(PY) -m apps.demo

# One process a core, each with one thread.
test: $(READY)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n auto

check: $(READY)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m pyright --pythonpath $(PY)
	$(PY) -m benchmarks.tables --check
	$(PY) -m pytest tests/test_layout.py tests/accel/test_compat.py -q

# Every figure of README, then the slow studies and the cards. Figures want a quiet machine. What
# another machine or older code has measured is measured again: `make bench FRESH=` instead goes on
# where studies were stopped here.
FRESH ?= --fresh
EVALUATE := $(VENV)/bin/accel evaluate all --device cpu
REPORTS := $(addprefix out/evaluate-,dit sd ddpm wan)
bench: $(READY) figures
	$(PY) -m pytest -m slow
	$(PY) -m benchmarks.bench_kill
	$(PY) -m benchmarks.bench_zoo
	$(PY) -m benchmarks.bench_tdm $(FRESH)
	$(PY) -m benchmarks.bench_tdm $(FRESH) --model zoo:digits-sd --samples 300
	$(PY) -m benchmarks.distil digits-wan-4-steps
	$(PY) -m benchmarks.distil digits-wan-4-steps-sparse
	$(PY) -m benchmarks.bench_tdm $(FRESH) --model zoo:digits-wan --samples 24 --rounds 3
	$(PY) -m benchmarks.bench_one_more_step
	$(VENV)/bin/accel measure recipes/digits-sd-one-more-step.yaml --model zoo:digits-sd \
		--device cpu
	$(PY) -m benchmarks.bench_time_shift $(FRESH)
	$(PY) -m benchmarks.bench_leap
	$(PY) -m benchmarks.bench_temporal_cache
	$(PY) -m benchmarks.bench_quant $(FRESH)
	$(PY) -m benchmarks.bench_quant $(FRESH) --model zoo:digits-ddpm
	$(PY) -m benchmarks.bench_quant $(FRESH) --model zoo:digits-sd
	$(PY) -m benchmarks.bench_quant_kernels
	$(PY) -m benchmarks.bench_caches $(FRESH)
	$(PY) -m benchmarks.bench_caches $(FRESH) --steps 20 --samples 200
	$(PY) -m benchmarks.bench_caches $(FRESH) --model zoo:digits-sd
	$(PY) -m benchmarks.bench_caches_video $(FRESH)
	$(PY) -m benchmarks.bench_cache_speed $(FRESH)
	$(PY) -m benchmarks.bench_robustness
	$(PY) -m benchmarks.bench_evaluate
	$(if $(FRESH),rm -rf $(REPORTS))
	$(EVALUATE) --model zoo:digits-dit --samples 500 --out out/evaluate-dit \
		$(addprefix --recipe ,$(filter-out recipes/digits-sd-%,$(wildcard recipes/*.yaml)))
	$(EVALUATE) --model zoo:digits-sd --samples 200 --out out/evaluate-sd \
		$(addprefix --recipe ,$(wildcard recipes/digits-sd-*.yaml))
	$(EVALUATE) --model zoo:digits-ddpm --samples 200 --out out/evaluate-ddpm \
		--recipe recipes/dpm.yaml
	$(EVALUATE) --model zoo:digits-wan --samples 24 --steps 20 --rounds 3 \
		--out out/evaluate-wan \
		$(addprefix --recipe ,$(filter-out recipes/digits-%,$(wildcard recipes/*.yaml)))
	$(PY) -m benchmarks.recipe_cards $(REPORTS)
	$(PY) -m benchmarks.bench_backend $(FRESH)
	$(PY) -m benchmarks.bench_sparse
	$(PY) -m benchmarks.bench_sparse_quality $(FRESH)
	$(PY) -m benchmarks.bench_search $(FRESH) --prompts 100
	$(PY) -m benchmarks.bench_search --kill
	$(PY) -m benchmarks.bench_search $(FRESH) --model zoo:digits-wan --prompts 16
	$(PY) -m benchmarks.bench_rlg
	$(PY) -m benchmarks.tables

# Speeds and qualities of the methods, of peers and of the core: about a quarter of an hour.
figures: $(READY)
	$(PY) -m pip install -q -c constraints.txt -e '.[peers]'
	$(PY) -m benchmarks.bench_native $(FRESH)
	$(PY) -m benchmarks.bench_peers $(FRESH)
	$(PY) -m benchmarks.waterfall $(FRESH)
	$(PY) -m benchmarks.bench_overhead
	set -e; for recipe in recipes/*.yaml; do \
		case $$recipe in */digits-sd-*) model=digits-sd;; *) model=digits-dit;; esac; \
		$(VENV)/bin/accel measure $$recipe --model zoo:$$model --device cpu; done
	$(PY) -m benchmarks.tables

# The same on a machine with an accelerator: figures go to results files of their own.
gpu: $(READY)
	$(PY) -c "import torch, sys; torch.cuda.is_available() or sys.exit('torch sees no GPU here')"
	$(PY) -m pip install -q -c constraints.txt -e '.[peers]'
	$(PY) -m pytest -m "slow or not slow" tests/accel tests/caches tests/samplers tests/quant/test_temporal_cache.py tests/quant/test_gpu_kernels.py tests/sparse_attn
	$(PY) -m benchmarks.bench_native $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_peers $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_temporal_cache --device cuda
	$(PY) -m benchmarks.bench_quant_kernels --device cuda
	$(PY) -m benchmarks.bench_caches $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_caches $(FRESH) --device cuda --model zoo:digits-sd
	$(PY) -m benchmarks.bench_caches_video $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_cache_speed $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_tdm $(FRESH) --device cuda
	$(PY) -m benchmarks.waterfall $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_overhead --device cuda
	$(PY) -m benchmarks.bench_backend $(FRESH) --device cuda
	$(PY) -m benchmarks.bench_sparse --device cuda
	$(PY) -m benchmarks.bench_sparse_quality $(FRESH) --device cuda
	$(PY) -m benchmarks.tables

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q -c constraints.txt "torch==$$(sed -n 's/^torch==//p' constraints.txt)"
	$(PY) -m pip install -q -c constraints.txt -e '.[dev]'
	touch $(READY)

clean:
	rm -rf demo out .pytest_cache .ruff_cache .hypothesis
