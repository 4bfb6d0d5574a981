# The front door: `make help` lists what there is.
#
# Variables: PRESET (of presets/), DATA_DIR (folder of the images), SET ("seed=1 epochs=3"),
#            WEIGHTS (file of ImageNet weights),
#            LAB_OPTIONS ("--no-browser --port=9000"), PYTHON (the interpreter that makes the
#            environment).

PRESET ?= laptop
PYTHON ?= python3.13 python3.12 python3.11 python3 python

VENV := .venv
BIN := $(VENV)/bin
# Written when the environment is whole: a copy of the lock file it was made from.
STAMP := $(VENV)/made-from.lock
SUITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
OF_DATA = $(if $(DATA_DIR),--data-dir '$(DATA_DIR)')
OF_WEIGHTS = $(if $(WEIGHTS),--weights '$(WEIGHTS)')
SETTINGS = $(foreach setting,$(SET),--set '$(setting)')
# A file's tests stay together, because some of them share what takes long to make.
IN_PROCESSES := --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run smoke ladder lab html test lint check-data compare adjust bench publish verify lock clean environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: environment ## environment, data, the three notebooks, figures and metrics [PRESET DATA_DIR SET WEIGHTS]
	$(BIN)/python -m marsclf run --preset '$(PRESET)' $(OF_DATA) $(OF_WEIGHTS) $(SETTINGS)

smoke: environment ## notebooks 01 to 03 on generated images, in a few minutes
	$(BIN)/python -m marsclf run --preset smoke --sample

ladder: environment ## the reference reproduced, its oddities switched off one by one [DATA_DIR]
	$(BIN)/python -m marsclf ladder $(OF_DATA)

lab: environment ## open the notebooks in JupyterLab [LAB_OPTIONS]
	$(BIN)/python -m marsclf lab -- $(LAB_OPTIONS)

html: environment ## make web pages of a run's notebooks [PRESET]
	$(BIN)/python -m marsclf html --preset '$(PRESET)'

test: verify ## all tests, after verify
	$(BIN)/python -m pytest $(IN_PROCESSES)

lint: environment ## check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

check-data: environment ## list every fault of the data [DATA_DIR]
	$(BIN)/python -m marsclf check-data $(OF_DATA)

compare: environment ## how a recipe does on later sols, without test [PRESET DATA_DIR SET]
	$(BIN)/python -m marsclf compare --preset '$(PRESET)' $(OF_DATA) $(SETTINGS)

adjust: environment ## what class frequencies or the camera would do to stored predictions
	$(BIN)/python -m marsclf adjust

bench: environment ## measure what the work costs, about half an hour [DATA_DIR]
	$(BIN)/python -m marsclf bench $(OF_DATA)

publish: environment ## copy a run's results into the repository [PRESET]
	$(BIN)/python -m marsclf publish --preset '$(PRESET)'

verify: environment ## recompute every published number
	$(BIN)/python -m marsclf verify

lock: ## pin all dependencies anew, at their newest (needs uv)
	uv pip compile --quiet --upgrade pyproject.toml --extra test --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" -o requirements.lock

clean: ## remove the environment, the runs and the cache (not the data)
	rm -rf $(VENV) runs cache .pytest_cache .ruff_cache *.egg-info

environment: $(STAMP)

# The lock file's time may change where its text does not, as in a checkout.
$(STAMP): requirements.lock
	@if cmp -s requirements.lock $(STAMP); then touch $(STAMP); exit 0; fi; \
	for python in $(PYTHON); do \
		if "$$python" -c '$(SUITS)' 2>/dev/null; then suitable=$$python; break; fi; \
	done; \
	if [ -z "$$suitable" ]; then \
		echo "error: marsclf needs Python 3.11, 3.12 or 3.13 with its venv module, and none of" \
			"these is one: $(PYTHON). Name one: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	fi; \
	echo "Making the environment in $(VENV) with $$suitable; this takes some minutes once."; \
	rm -rf $(VENV) && \
	"$$suitable" -m venv $(VENV) && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--require-hashes -r requirements.lock && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation -e . && \
	cp requirements.lock $(STAMP).new && mv $(STAMP).new $(STAMP)
