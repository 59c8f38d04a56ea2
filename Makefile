# Both targets need Python >= 3.11 and a package index, nothing else.
#   make demo   install, then sweep ε on the embedded Adult table
#   make test   install, then every check that CI runs
#   make clean  remove what make made (environment, caches, demo); runs of your own stay

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed

.DEFAULT_GOAL := test
.PHONY: demo test clean

# torch goes first and by its exact version, so that the build which the index offers for this
# machine (CPU or GPU) is settled before anything else can ask for one.
$(INSTALLED): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/dpsynth sweep +experiment=demo

test: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/lint-imports
	$(BIN)/pytest

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
