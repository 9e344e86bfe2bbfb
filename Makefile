# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types tests gallery gpu fuzz coverage mutants clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   every check: ruff, mypy --strict, pytest"
	@echo "make lint | types | tests   one of the checks"
	@echo "make gallery  docs/gallery.md and its pictures, drawn again"
	@echo "make gpu    everything that waits for a GPU, in parts: PART=check, kernels, step or peers; see docs/gpu.md"
	@echo "make fuzz MINUTES=n [TARGET=a,b]  the laws on new and wider cases, n minutes a target"
	@echo "make coverage | mutants [EVERY=n]  what the tests of patterns, tables and the CPU backend leave untried"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/ready
	$(BIN)/sparseflash demo

test: lint types tests

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

tests: .venv/ready
	$(BIN)/python -m pytest -n 2

gallery: .venv/ready
	$(BIN)/python -m docs.make_gallery

# Needs no .venv: the Python of a GPU machine serves that has the run-time dependencies, pytest and hypothesis.
gpu:
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(PART)

# The suite's laws on new and wider cases, MINUTES of processor time for each target; findings lie in fuzz-findings/.
MINUTES ?= 1
fuzz: .venv/ready
	PYTHONPATH=. $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET))

# What the tests of patterns, tables and the CPU backend leave untried, and which small changes there they do not notice.
EVERY ?= 1
COVERING := $(patsubst %,tests/test_%.py,pattern_laws pattern_definitions parsing mask_files conversions robustness where \
  bad_input checking schedule waste drawing viewer text_at_random operators cpu_pieces attention_laws attention_features \
  heavy_lines decode dropout)
coverage: .venv/ready
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "coverage>=7.6"
	PYTHONPATH=. $(BIN)/python -m coverage run -m pytest $(COVERING)
	$(BIN)/python -m coverage report

mutants: .venv/ready
	for part in patterns tables cpu; do PYTHONPATH=. $(BIN)/python -m tests.mutants $$part --every $(EVERY) || failed=1; done; \
	  exit $${failed:-0}

clean:
	rm -rf .venv dist build fuzz-findings .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
