# make demo    train a small model on text already on this machine, and see its cost per token stay flat
# make test    the tests that need neither a GPU nor patience
# make check   format, lint, types, import direction
# make gpu     the GPU tests and benchmarks; JSON goes to $OUT when it is set
# make bench   the benchmarks of benchmarks/results/, on an idle machine
# make docs    the generated pages, and every example in the documentation
#
# PYTHON=python3.12 chooses the interpreter of a new environment, VENV=folder its place.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
RESULTS := $(or $(OUT),benchmarks/results)

.PHONY: demo test check gpu bench docs clean
.DELETE_ON_ERROR:

demo: $(VENV)/.ready-demo
	$(BIN)/python tools/demo.py

test: $(VENV)/.ready-all
	$(BIN)/python -m pytest -n auto

check: $(VENV)/.ready-all
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy isotach tools
	$(BIN)/python -m pytest --quiet tests/unit/test_imports.py

gpu: $(VENV)/.ready-all
	$(BIN)/python -m pytest -m gpu -n 4 --dist loadgroup  # most of their time goes to compiling kernels
	$(BIN)/isotach bench ops --device cuda --wait 0 --minutes 4 --out $(RESULTS)
	$(BIN)/isotach bench decode --device cuda --wait 0 --out $(RESULTS)
	$(BIN)/isotach bench sample --device cuda --wait 0 --out $(RESULTS)

bench: $(VENV)/.ready-all
	$(BIN)/isotach bench ops --out $(RESULTS)
	$(BIN)/isotach bench mixers --out $(RESULTS)
	$(BIN)/isotach bench decode --out $(RESULTS)
	$(BIN)/isotach bench train --out $(RESULTS)
	$(BIN)/isotach bench sample --out $(RESULTS)
	$(BIN)/isotach bench serve --out $(RESULTS)

docs: $(VENV)/.ready-all
	$(BIN)/python -m tools.docs

clean:
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache

# A stamp stands for "installed": it is older than pyproject.toml or constraints.txt exactly when there is work to do.
$(VENV)/.ready-demo: EXTRAS := plot
$(VENV)/.ready-all: EXTRAS := all,dev
$(VENV)/.ready-%: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --constraint constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo 'Isotach needs Python 3.11 or newer; "$(PYTHON)" is older or missing. Try: make PYTHON=python3.12' >&2; exit 2; }
	@echo '$(PYTHON) -m venv $(VENV)'; $(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); \
		echo 'Could not make an environment; on Debian and Ubuntu: apt install python3-venv' >&2; exit 2; }
