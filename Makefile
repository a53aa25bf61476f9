# make demo    trains a small model through three stages and shows what it draws
# make test    the tests, at most 20 minutes on 2 cores
# make test-s3 the store against a real S3 server: Ceph, whose Debian packages it unpacks into .cache
# make test-browser  the page in a real browser: Chromium, from Debian's package
# make lint    ruff and mypy
# make docs    the site of these documents, in .cache/site
# make bench   what is measured rather than asserted, but for what takes long, which is:
# make step    a training step with each of its economies off in turn, a quarter of an hour
# make prove   trains a small model on drawn shapes and scores it: the yardstick for changes of recipe; SEEDS=3 for more
# make prove-pixeldit  the same with PixelDiT, at equal compute
# make soak    training killed at 25 moments and resumed: nothing lost, nothing different
# make ablation  the paper's loss taken apart: four short runs, compared in .cache/ablation/table.md
# make xxl     one optimizer step of the full-size model on a CPU with 24 GiB: its memory and seconds, by part
# All need Linux and Python 3.11 or later; what compiles networks (test, prove, step) also a C++ compiler and Python's
# headers. Everything else comes from the Python package registry, into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DATA := .cache/demo
LONG := %/train_step.py %/kill_soak.py %/ablation.py %/xxl.py %/same_run.py %/house.py
export PATH := $(CURDIR)/$(BIN):$(PATH)

SEEDS ?= 1
NAME ?= prove

.PHONY: setup demo prove prove-pixeldit test test-s3 test-browser lint docs bench step soak ablation xxl clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt torch torchvision
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,dev,eval,serve]'
	touch $@

demo: setup
	python launch/pack.py openmoji --out $(DATA)/openmoji --size 64
	python launch/pack.py shapes --out $(DATA)/shapes --size 64 --count 20000
	deepspeed --log_level error --num_gpus 2 launch/curriculum.py --config configs/demo.yaml

# Runs prove, prove1, prove2, ... differ in their seed alone.
prove: setup
	python launch/pack.py shapes --out .cache/prove/shapes --size 32 --count 100000 --heldout 0.01 --heldout_captions 0.1
	@runs=; for seed in $$(seq 0 $$(($(SEEDS) - 1))); do \
		run=runs/$(NAME)$${seed#0}; runs="$$runs $$run"; \
		deepspeed --log_level error --num_gpus 2 launch/stage1.py --config configs/$(NAME).yaml \
			--name $${run#runs/} --seed $$seed && \
		deepspeed --log_level error --num_gpus 2 launch/geneval.py --detector shapes \
			--model $$run/scenes/model --out $$run/geneval || exit 1; \
	done; [ $(SEEDS) = 1 ] || python launch/compare.py $$runs

prove-pixeldit:
	$(MAKE) prove NAME=prove_pixeldit

test: setup
	pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# The packages first: where they cannot be had, this fails, while the tests alone would skip.
test-s3: setup
	python tests/s3/ceph.py --fetch
	pytest -m s3 tests/s3

# The browser is no Python package: without one the tests would skip, and this fails.
test-browser: setup
	@command -v chromium >/dev/null || { echo 'make test-browser needs Chromium: apt-get install chromium'; exit 1; }
	pytest -m browser tests/browser

lint: setup
	ruff check .
	ruff format --check .
	mypy

docs: setup
	NO_MKDOCS_2_WARNING=1 mkdocs build --quiet --strict

bench: setup
	@for script in $(filter-out $(LONG),$(wildcard tests/benchmarks/*.py)); do echo "$$script"; python $$script; done

step: setup
	python tests/benchmarks/train_step.py

soak: setup
	python tests/benchmarks/kill_soak.py

ablation: setup
	python tests/benchmarks/ablation.py

xxl: setup
	mkdir -p .cache/xxl
	python tests/benchmarks/xxl.py > .cache/xxl/step.json && cat .cache/xxl/step.json

clean:
	rm -rf .venv .cache runs
