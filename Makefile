# `make help` lists the targets.
#
# Variables: PRESET (of presets/), DATA_DIR (folder of the images), SET ("seed=1 epochs=3"),
#            WEIGHTS (file of ImageNet weights), YES_ON_CPU (1: train for hours without a GPU),
#            LAB_OPTIONS ("--no-browser --port=9000"),
#            PYTHON (the interpreter that creates the environment).

PRESET ?= laptop
PYTHON ?= python3.13 python3.12 python3.11 python3 python

VENV := .venv
BIN := $(VENV)/bin
# Written when the environment is complete: its folder, as one that was copied or moved still imports
# the package of the other checkout, and the lock file that it was made from.
STAMP := $(VENV)/made-from.lock
SUITS := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# A text as one word of the shell, apostrophes included.
quote = '$(subst ','\'',$(1))'
DATA_OPTION = $(if $(DATA_DIR),--data-dir $(call quote,$(DATA_DIR)))
WEIGHTS_OPTION = $(if $(WEIGHTS),--weights $(call quote,$(WEIGHTS)))
SET_OPTIONS = $(foreach setting,$(SET),--set $(call quote,$(setting)))
CPU_OPTION = $(if $(YES_ON_CPU),--yes-on-cpu)
PRESET_OPTION = --preset $(call quote,$(PRESET))
RUN_DIR = $(call quote,runs/$(PRESET))
# As in a run (see marsclf/pipeline/run.py); what the user has set takes precedence.
export TF_CPP_MIN_LOG_LEVEL ?= 3
# Before the user's own folders: the notebooks need this kernel, and this backend.
lab: export JUPYTER_PATH := $(CURDIR)/marsclf/jupyter$(if $(JUPYTER_PATH),:$(JUPYTER_PATH))
lab: export JUPYTER_PREFER_ENV_PATH ?= 1
lab: export KERAS_BACKEND := tensorflow
lab compare classifier: export MALLOC_MMAP_THRESHOLD_ ?= 1073741824
lab compare classifier: export MALLOC_TRIM_THRESHOLD_ ?= 4294967296
lab compare classifier: export MALLOC_TOP_PAD_ ?= 67108864
# The tests of one file share fixtures that take long to make.
TEST_OPTIONS := --numprocesses=logical --maxprocesses=4 --dist=loadfile --no-loadscope-reorder

.DEFAULT_GOAL := help
.PHONY: help run smoke ladder lab html test lint check-data compare bench gpu-cost classifier publish site verify lock clean environment

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

run: environment ## environment, data, notebooks, figures and metrics [PRESET DATA_DIR SET WEIGHTS]
	$(BIN)/python -m marsclf run $(PRESET_OPTION) $(DATA_OPTION) $(WEIGHTS_OPTION) $(CPU_OPTION) $(SET_OPTIONS)

smoke: environment ## notebooks 01 to 03 on generated images, in a few minutes
	$(BIN)/python -m marsclf run --preset smoke --sample

ladder: environment ## the reference reproduced, its faults corrected one by one [DATA_DIR]
	$(BIN)/python -m marsclf run --preset ladder $(DATA_OPTION)

lab: environment ## open the notebooks in JupyterLab [LAB_OPTIONS]
	@case "$$(id -u) $(LAB_OPTIONS)" in *--allow-root*|[!0]*) ;; *) echo "error: JupyterLab does not start" \
		"for root by itself: make lab LAB_OPTIONS=--allow-root" >&2; exit 1 ;; esac
	$(BIN)/jupyter lab --ServerApp.root_dir=$(call quote,$(CURDIR)) --LabApp.default_url=/lab/tree/notebooks $(LAB_OPTIONS)

html: environment ## web pages of a run's notebooks, in runs/PRESET/html [PRESET]
	@ls $(RUN_DIR)/*.ipynb >/dev/null 2>&1 || { runs=$$(ls runs/*/*.ipynb 2>/dev/null | cut -d / -f 2 | uniq); \
		echo "error: There are no executed notebooks in" $(RUN_DIR): \
		run \`make run PRESET=$(call quote,$(PRESET))\`$${runs:+, or set PRESET to one of: $$runs}. >&2; exit 1; }
	$(BIN)/jupyter nbconvert --log-level=WARN --to html --embed-images --template=folded \
		--TemplateExporter.extra_template_basedirs=tools/templates/html \
		--output-dir=$(RUN_DIR)/html $(RUN_DIR)/*.ipynb

test: verify ## all tests, after verify
	$(BIN)/python -m pytest $(TEST_OPTIONS)

lint: environment ## check style, format and imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

check-data: environment ## list every fault of the data [DATA_DIR]
	$(BIN)/python -m marsclf check-data $(DATA_OPTION)

compare: environment ## compare a recipe on later sols, without the test split [PRESET DATA_DIR SET SEEDS]
	$(BIN)/python -m tools.compare $(PRESET_OPTION) $(DATA_OPTION) $(SET_OPTIONS) $(if $(SEEDS),--seeds $(SEEDS))

bench: environment ## measure what the work costs, in about half an hour [DATA_DIR]
	$(BIN)/python -m tools.bench $(DATA_OPTION)

gpu-cost: environment ## measure what EfficientNetB7 costs on a GPU
	$(BIN)/python -m tools.gpu_cost

classifier: environment ## train one of the library's classifiers on all labels [PRESET DATA_DIR OUTSIDE_DIR]
	$(BIN)/python -m tools.train_classifier $(PRESET_OPTION) $(DATA_OPTION) \
		$(if $(OUTSIDE_DIR),--outside-dir $(call quote,$(OUTSIDE_DIR)))

publish: environment ## copy a run's results into the repository [PRESET]
	$(BIN)/python -m tools.publish $(PRESET_OPTION)

site: environment ## web page in docs/, from the published run of the default preset
	$(BIN)/python -m tools.site

verify: environment ## recompute every published number
	$(BIN)/python -m tools.verify

lock: ## pin all dependencies at their newest versions (needs uv)
	uv pip compile --quiet --upgrade pyproject.toml --extra test --universal --python-version 3.11 \
		--fork-strategy fewest --generate-hashes --no-emit-index-url --no-emit-find-links \
		--custom-compile-command "make lock" -o requirements.lock

clean: ## remove the environment, the runs and the cache (not the data)
	rm -rf $(VENV) runs cache .pytest_cache .ruff_cache *.egg-info

environment:
	@made_for=$$(head -n 1 $(STAMP) 2>/dev/null); here=$$(pwd -P); \
	if { echo "$$here"; cat requirements.lock; } | cmp -s - $(STAMP); then exit 0; fi; \
	case "$$made_for" in "$$here"|"") ;; /*) \
		echo "The environment in $(VENV) was made in $$made_for, so it is made again here." ;; \
	esac; \
	for python in $(PYTHON); do \
		if "$$python" -c '$(SUITS)' 2>/dev/null; then suitable=$$python; break; fi; \
	done; \
	if [ -z "$$suitable" ]; then \
		echo "error: marsclf needs Python 3.11, 3.12 or 3.13 with its venv module, which none of" \
			"these is: $(PYTHON). Name one: make PYTHON=/path/to/python3.12 ..." >&2; \
		exit 1; \
	fi; \
	echo "Making the environment in $(VENV) with $$suitable; this takes some minutes, once."; \
	show='/^(Collecting|Installing)/ { printf "\r\033[K%.70s", $$0; fflush() } END { printf "\r\033[K" }'; \
	[ -t 1 ] || show='END { }'; \
	rm -rf $(VENV) && \
	"$$suitable" -m venv $(VENV) && \
	{ $(BIN)/python -m pip install --disable-pip-version-check --progress-bar off \
		--require-hashes -r requirements.lock && touch $(STAMP).installed; } | awk "$$show" && \
	rm $(STAMP).installed 2>/dev/null && \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --no-build-isolation -e . && \
	{ echo "$$here"; cat requirements.lock; } > $(STAMP).new && mv $(STAMP).new $(STAMP)
