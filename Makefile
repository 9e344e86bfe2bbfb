# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types tests gallery gpu clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   every check: ruff, mypy --strict, pytest"
	@echo "make lint | types | tests   one of the checks"
	@echo "make gallery  docs/gallery.md and its pictures, drawn again"
	@echo "make gpu    everything that waits for a GPU, in parts: PART=check, kernels, step or peers; see docs/gpu.md"

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

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
