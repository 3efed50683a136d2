# Set-up, training and tests by one word each. `make` alone prints what there is.

DATASET  ?= demo     ## demo, ucf101, hmdb51, k400, ssv2, a folder of clips, or a dataset of the Hub (org/name)
DATA_ROOT ?=         ## where datasets are kept and demo clips rendered (the recipe's data.root)
BACKBONE ?=          ## CLIP checkpoint: Hub id, folder or preset (b32, b16, l14, tiny)
FRAMES   ?=          ## frames per clip (the recipe's model.num_frames; for evaluate the model's own)
K        ?= 16       ## for fewshot: training clips of each class
SPLITS   ?= 1        ## for fewshot: official splits to run and average, such as "1 2 3"
DEVICES  ?=          ## devices of this machine (the recipe's trainer.devices)
NUM_NODES ?=         ## machines (the recipe's trainer.num_nodes); see recipes/launch/
STRATEGY ?=          ## auto, ddp, fsdp (weights shared out among the devices) or deepspeed
PRECISION ?=         ## 32, bf16-mixed (the benchmarks' recipes), 16-mixed
EPOCHS   ?=          ## epochs (the recipe's trainer.max_epochs)
FEATURES ?=          ## folder of frame features: the tower is frozen, the head trained from them
VIEWS    ?= 4        ## with FEATURES: random views of each training clip
OUT      ?=          ## folder of the run (the recipe's output); for evaluate, of the results
MODEL    ?=          ## exported folder or Hub id, for evaluate, predict and push (push: that of the run in OUT)
FILES    ?=          ## video files, for predict
REPO     ?=          ## repository on the Hub, for push
BENCH    ?= step head  ## for bench: scripts of benchmarks/, by name
ARGS     ?=          ## anything else for the command line, such as --model.freeze_backbone true

PYTHON   ?= python3
VENV     := .venv
BIN      := $(VENV)/bin
READY    := $(VENV)/.ready
SUITE    := $(VENV)/transformers-tests/VERSION

# A misspelt variable would run something else without a word.
KNOWN := DATASET DATA_ROOT BACKBONE FRAMES K SPLITS DEVICES NUM_NODES STRATEGY PRECISION EPOCHS FEATURES VIEWS OUT \
	MODEL FILES REPO BENCH ARGS PYTHON VENV
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(origin $(name))),$(name)))
$(if $(filter-out $(KNOWN),$(GIVEN)),$(error no variable $(filter-out $(KNOWN),$(GIVEN)); there are $(KNOWN)))

# A comment behind a value leaves blanks: strip them once.
DATASET := $(strip $(DATASET))
# A name with a recipe, else a path to clips for the folder recipe.
RECIPE := $(or $(if $(findstring /,$(DATASET)),,$(wildcard recipes/$(DATASET).yaml)),recipes/folder.yaml)
SOURCE := $(if $(filter recipes/folder.yaml,$(RECIPE)),--data.source "$(DATASET)")
FEW_SHOT := recipes/few_shot/$(DATASET).yaml
option = $(if $(strip $(2)),$(1) "$(strip $(2))")
OUT_KEY = --output
OPTIONS = $(SOURCE) $(call option,--data.root,$(DATA_ROOT)) $(call option,--model.backbone,$(BACKBONE)) \
	$(call option,--model.num_frames,$(FRAMES)) \
	$(call option,--trainer.devices,$(DEVICES)) $(call option,--trainer.num_nodes,$(NUM_NODES)) \
	$(call option,--trainer.strategy,$(STRATEGY)) $(call option,--trainer.precision,$(PRECISION)) \
	$(call option,--trainer.max_epochs,$(EPOCHS)) \
	$(if $(strip $(FEATURES)),$(call option,--data.feature_cache,$(FEATURES)) --model.freeze_backbone true) \
	$(if $(strip $(FEATURES)),$(call option,--data.train_views,$(VIEWS))) \
	$(call option,$(OUT_KEY),$(OUT)) $(ARGS)

ifneq ($(and $(filter command,$(origin VIEWS)),$(if $(strip $(FEATURES)),,alone)),)
  $(error VIEWS goes with FEATURES; without: ARGS="--data.train_views $(strip $(VIEWS))")
endif

NEEDS_MODEL = $(if $(strip $(MODEL)),,$(error MODEL is empty: name an export, such as MODEL=runs/demo/export))

NEEDS_REPO = $(if $(strip $(REPO)),,$(error REPO is empty: name the repository, such as REPO=org/name))
# What is pushed unless MODEL says so: the export of the run that the same variables trained.
RUN = $(or $(strip $(OUT)),$(shell sed -nE 's/^output: *([^ ]+).*/\1/p' $(RECIPE)))
EXPORT = $(or $(strip $(MODEL)),$(shell test -d "$(RUN)/export" && echo "$(RUN)/export"),$(error \
	$(RUN)/export is not there: train first, or name an export, such as MODEL=runs/demo/export))

# A test a core: their models are too small to share two.
TESTED = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n logical --maxprocesses 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup finetune fewshot prepare evaluate predict push cards bench profile test test-fast lint format \
	clean

help:  ## print this
	@echo "targets:"
	@sed -nE 's/^([a-z-]+):.*  ## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14
	@echo "variables:"
	@sed -nE 's/^([A-Z_]+) *\?=.*## (.*)/  \1\t\2/p' $(MAKEFILE_LIST) | expand -t 14

setup: $(READY)  ## make .venv and install the package with the pinned stack

$(READY): setup.cfg pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e ".[dev]" -c constraints.txt
	@touch $@

finetune: $(READY)  ## train, evaluate and export: make finetune DATASET=/path/to/folder
	$(if $(filter command,$(origin K)),$(error K is for fewshot; here: ARGS="--data.shots $(K)"))$(BIN)/vidprism finetune --config $(RECIPE) $(OPTIONS)

fewshot: $(READY)  ## K clips of each class: make fewshot DATASET=hmdb51 K=16
	@test -f $(FEW_SHOT) || { echo "no recipe $(FEW_SHOT): DATASET must be one of" \
	  $(basename $(notdir $(wildcard recipes/few_shot/*.yaml))); \
	  echo "for your own clips: make finetune DATASET=$(DATASET) ARGS=\"--data.shots $(K)\""; exit 2; }
	$(BIN)/vidprism splits --splits $(SPLITS) --config $(FEW_SHOT) --data.shots $(K) $(OPTIONS)

prepare: $(READY)  ## fetch and verify a benchmark: make prepare DATASET=ucf101
	$(BIN)/vidprism data prepare $(DATASET) $(call option,--root,$(DATA_ROOT))

evaluate: OUT_KEY = --evaluation.output
evaluate: $(READY)  ## any video classifier on the held-out clips: make evaluate MODEL=runs/demo/export
	$(NEEDS_MODEL)$(BIN)/vidprism evaluate "$(MODEL)" --config $(RECIPE) $(OPTIONS)

predict: $(READY)  ## top labels of files: make predict MODEL=runs/demo/export FILES="a.mp4 b.mp4"
	$(NEEDS_MODEL)$(BIN)/vidprism predict "$(MODEL)" $(FILES) $(ARGS)

push: $(READY)  ## publish the export of a run: make push REPO=org/name [OUT=runs/demo] [MODEL=FOLDER]
	$(NEEDS_REPO)$(BIN)/vidprism push "$(EXPORT)" --repo "$(REPO)" $(ARGS)

cards: $(READY)  ## write the presets' model cards anew, from model_cards/presets.yaml and the recipes
	$(BIN)/python model_cards/generate.py

bench: $(READY)  ## measure what benchmarks/README.md claims: make bench BENCH=step ARGS="--device cuda"
	for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

profile: $(READY)  ## where the time of a run's steps goes: make profile DATASET=/path/to/folder BACKBONE=b16
	$(BIN)/python benchmarks/profile_run.py --config $(RECIPE) $(OPTIONS)

# transformers' own model tests, at the installed version; not in its wheel.
$(SUITE): $(READY) tests/transformers_suite.py
	$(BIN)/python tests/transformers_suite.py $(dir $@)
	@touch $@

test: $(READY) $(SUITE)  ## all tests, with the slow ones
	$(TESTED) -m "slow or not slow" $(ARGS)

test-fast: $(READY) $(SUITE)  ## the tests that take a few minutes in all
	$(TESTED) $(ARGS)

lint: $(READY)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY)  ## mend style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove .venv and what tools left behind; keeps runs and data
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
