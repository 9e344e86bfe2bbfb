# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types tests clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   every check: ruff, mypy --strict, pytest"
	@echo "make lint | types | tests   one of the checks"

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
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
	$(BIN)/python -m pytest

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
