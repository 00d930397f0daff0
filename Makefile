# make demo   a Chinese query finds the right picture: installs, builds, serves, searches
# make test   everything that must hold, in under 40 minutes on two cores
# Only Python 3.11 or later and make are needed; all else goes into .venv.

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt
# TensorRT's parser and builder without a GPU: 220 MB. Its dependencies are for running on one.
TENSORRT_RTX := tensorrt-rtx==1.7.1.116 tensorrt-rtx-cu12==1.7.1.116 tensorrt-rtx-cu12-libs==1.7.1.116 \
	tensorrt-rtx-cu12-bindings==1.7.1.116
QUERIES := 墨镜 生日蛋糕 红色的心 吃的水果 哭泣的猫 时钟

.PHONY: demo test test-slow lint check-tensorrt check-coreml perf-analyzer bench-serving bench-overload bench-faults bench-training bench-ranking fuzz sample clean

.venv/bin/pip:
	$(PYTHON) -m venv .venv

.venv/.serve: .venv/bin/pip pyproject.toml clients/python/pyproject.toml clients/web/pyproject.toml constraints.txt
	$(PIP) torch==2.13.0
	$(PIP) --editable '.[serve,build]' --editable clients/python --editable clients/web
	@touch $@

.venv/.dev: .venv/.serve
	$(PIP) --editable '.[serve,build,gpu,coreml,bench,train,eval,ray,dev]' --editable clients/python --editable clients/web
	@# Without its dependencies: torchvision does not import beside a CPU build of torch, and the tests stub it.
	$(PIP) --no-deps cn-clip==1.6.0
	@# 18 MB, a few seconds. Where it cannot be had, the tests that need it are skipped and say so.
	-$(BIN)/python -m perf.fetch_analyzer
	-$(PIP) --no-deps $(TENSORRT_RTX)
	@touch $@

.venv/.bench: .venv/.serve
	$(PIP) --editable '.[serve,build,bench]' --editable clients/python six
	$(PIP) --no-deps cn-clip==1.6.0
	@touch $@

.venv/.tensorrt: .venv/.serve
	$(PIP) --no-deps $(TENSORRT_RTX)
	@touch $@

demo: .venv/.serve
	$(BIN)/tuwen build --checkpoint samples/emoji_tiny
	$(BIN)/tuwen search $(QUERIES) --serve --images samples/emoji_cn/valid_imgs.tsv --sheet demo/contact_sheet.png

lint: .venv/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache
	$(BIN)/tuwen render --check

test: lint
	$(BIN)/pytest

# Full-size towers against the published implementations, and the real data build where `tuwen data emoji`
# has fetched its packages: about ten minutes and 12 GB of memory.
test-slow: .venv/.dev
	$(BIN)/pytest -m slow

# Every tower of every architecture through TensorRT's parser and builder, for GPUs that are not there: some twelve
# minutes on two cores, 12 GB of memory. Writes docs/tensorrt_check.md; a tower that is refused fails it.
check-tensorrt: .venv/.tensorrt
	$(BIN)/python -m perf.check_tensorrt

# NVIDIA's load generator for `tuwen bench run`, into .cache/perf_analyzer; no root needed.
perf-analyzer: .venv/.bench
	$(BIN)/python -m perf.fetch_analyzer

# Serving against the published implementation and against bare ONNX Runtime, full-size ViT-B-16, then
# overload, faults and fuzzing: an hour.
bench-serving: .venv/.bench
	$(BIN)/python -m perf.preprocess
	$(BIN)/python -m perf.lengths
	$(BIN)/python -m perf.batches_at_once
	$(BIN)/python -m perf.serving
	$(MAKE) --keep-going bench-overload bench-faults fuzz

# Three times as many texts as can be answered, for a minute; each bound that is missed fails it.
bench-overload: .venv/.bench
	$(BIN)/python -m perf.overload

# Parts of a server killed, stopped, cut off and starved; a wrong answer fails it. As root, /dev/shm is filled as well.
bench-faults: .venv/.bench
	$(BIN)/python -m perf.faults

# Predictions and recall of 30,000 texts and 100,000 pictures against the published scripts: five minutes.
bench-ranking: .venv/.bench
	$(BIN)/python -m perf.ranking

# Training beside Chinese-CLIP's own trainer, and with a batch of 4,096; each bound that is missed fails it.
bench-training: .venv/.bench
	$(BIN)/python -m perf.training

# Core ML packages of all architectures in all precisions, run by our evaluator: an hour and 16 GB of memory. A recall
# that falls too far fails it.
check-coreml: .venv/.bench
	$(PIP) --editable '.[coreml]'
	$(BIN)/python -m perf.coreml --docs docs/coreml_figures.md

# Damaged pictures and odd texts: some five minutes on two cores.
fuzz: .venv/.serve
	$(BIN)/python -m perf.fuzz --inputs 200000
	$(BIN)/python -m perf.fuzz --live 5000 --serve

# Rebuilds data and sample checkpoint from scratch: about an hour on two cores.
sample: .venv/.serve
	$(BIN)/tuwen data emoji --out data/emoji_cn
	$(BIN)/tuwen data lmdb --data data/emoji_cn
	$(BIN)/tuwen train training/recipes/emoji_tiny.toml
	$(BIN)/tuwen train training/recipes/emoji_tiny_queries.toml
	$(BIN)/tuwen eval retrieval --checkpoint runs/emoji_tiny_queries --data data/emoji_cn --split seen
	$(BIN)/tuwen eval retrieval --checkpoint runs/emoji_tiny_queries --data data/emoji_cn --split valid

clean:
	rm -rf .venv demo .mypy_cache .ruff_cache .pytest_cache
