# Every target sets up its environment: a .venv beside this file, made once. PYTHON=/path/to/python uses that environment
# instead and installs nothing.

HERE := $(patsubst %/,%,$(dir $(abspath $(lastword $(MAKEFILE_LIST)))))
WORKERS ?= 2# processes of the test suite

ifdef PYTHON
PY := $(PYTHON)
READY :=
export PYTHONPATH := $(HERE)
else
PY := $(HERE)/.venv/bin/python
READY := .venv/installed
endif

LDM := $(PY) -m ldm.cli.main

.DEFAULT_GOAL := help
.PHONY: help install demo demo-pixels demo-lora demo-lcm digits digits-class conditions demo-inpaint demo-two textures photos test slow signals torture fuzz mutants check format release clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 20

.venv/installed: pyproject.toml constraints.txt
	python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is %s: Python 3.11 or newer is needed" % sys.version.split()[0])'
	python3 -m venv .venv
	.venv/bin/python -m pip install -c constraints.txt -e ".[test,peers,digits,photos]"
	touch $@

install: $(READY) ## make the environment (.venv)

demo: $(READY) ## train the demo on drawn shapes and evaluate it (CPU)
	$(LDM) train-autoencoder configs/demo/autoencoder.yaml
	$(LDM) train-clip configs/demo/clip.yaml
	$(LDM) train-ldm configs/demo/ldm.yaml
	$(LDM) evaluate runs/demo

demo-pixels: $(READY) ## train the demo in pixel space; likelihood of both models (after demo)
	$(LDM) train-ldm configs/demo-pixels/ldm.yaml
	$(LDM) evaluate runs/demo --likelihood
	$(LDM) evaluate runs/demo-pixels --likelihood

demo-lora: $(READY) ## train a LoRA that draws striped objects, and evaluate it (after demo)
	$(LDM) train-ldm configs/demo-lora/ldm.yaml
	$(LDM) evaluate runs/demo-lora

demo-lcm: $(READY) ## distil the demo for 1, 2 and 4 steps, and evaluate it beside the demo (after demo)
	$(LDM) train-ldm configs/demo-lcm/ldm.yaml
	for n in 1 2 4; do $(LDM) evaluate runs/demo-lcm sample.steps=$$n --out runs/demo-lcm/steps-$$n || exit; done
	$(LDM) evaluate runs/demo sample.steps=4 --out runs/demo-lcm/teacher-4
	$(LDM) evaluate runs/demo --out runs/demo-lcm/teacher-10

digits: $(READY) ## the demo on handwritten digits
	$(LDM) train-autoencoder configs/digits/autoencoder.yaml
	$(LDM) train-clip configs/digits/clip.yaml
	$(LDM) train-ldm configs/digits/ldm.yaml
	$(LDM) evaluate runs/digits

digits-class: $(READY) ## digits by their class, without text (after digits)
	$(LDM) train-ldm configs/digits-class/ldm.yaml
	$(LDM) evaluate runs/digits-class

conditions: $(READY) ## a caption, a number and a class at once, and each guided alone
	$(LDM) train-autoencoder configs/shapes-columns/autoencoder.yaml
	$(LDM) train-clip configs/shapes-columns/clip.yaml
	$(LDM) train-ldm configs/shapes-columns/ldm.yaml
	$(PY) benchmarks/conditions.py runs/shapes-columns

demo-inpaint: $(READY) ## the demo given masked images, to fill what is masked (after demo)
	$(LDM) train-ldm configs/demo-inpaint/ldm.yaml
	$(LDM) evaluate runs/demo-inpaint
	$(PY) benchmarks/editing.py runs/demo-inpaint

demo-two: $(READY) ## the demo on scenes of two shapes
	$(LDM) train-autoencoder configs/demo-two/autoencoder.yaml
	$(LDM) train-clip configs/demo-two/clip.yaml
	$(LDM) train-ldm configs/demo-two/ldm.yaml
	$(LDM) evaluate runs/demo-two

textures: $(READY) ## train and compare autoencoders without and with adversarial loss
	$(LDM) train-autoencoder configs/textures/l1.yaml
	$(LDM) train-autoencoder configs/textures/gan.yaml
	$(LDM) compare-autoencoders runs/textures/l1 runs/textures/gan

runs/photographs/crops: | $(READY)
	$(PY) examples/folder_of_photos.py $@

photos: runs/photographs/crops ## the same on crops of photographs
	$(LDM) train-autoencoder configs/photographs/l1.yaml
	$(LDM) train-autoencoder configs/photographs/gan.yaml
	$(LDM) compare-autoencoders runs/photographs/l1 runs/photographs/gan

test: $(READY) ## run the tests
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(WORKERS)

slow: $(READY) ## run the tests marked slow
	$(PY) -m pytest -m slow

signals: $(READY) ## send signals to each launcher in each phase of training; check what is saved (10 minutes)
	$(PY) tests/signals.py

torture: $(READY) ## kill each stage's training 25 times, and compare with an uninterrupted run
	$(PY) tests/torture.py

mutants: $(READY) ## plant errors in copies of the code, one at a time; tests must find each (15 minutes)
	$(PY) tests/mutants.py

fuzz: $(READY) ## 2,000 calls with damaged or odd input: no traceback, no hang, the right exit code (20 minutes)
	$(PY) tests/fuzz.py

check: $(READY) ## formatting, lint and types, then the tests
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m pyright --pythonpath $(PY)
	$(MAKE) test

format: $(READY) ## format the code and fix what lint can fix
	$(PY) -m ruff format .
	$(PY) -m ruff check --fix .

release: $(READY) ## build sdist and wheel of this version into dist/ and tag it; refuses a dirty tree
	PYTHON=$(PY) .ci/release

clean: ## delete build leftovers; runs/ and .venv stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find autoencoder ldm scripts tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
