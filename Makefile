# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types tests gallery docs gpu clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   every check: ruff, mypy --strict, pytest"
	@echo "make lint | types | tests   one of the checks"
	@echo "make gallery  docs/gallery.md, its pictures and the drawings of the tables, drawn again"
	@echo "make docs   the documentation site in build/site, notebooks executed, every warning an error"
	@echo "make gpu    the attention laws on the Triton kernels, on a machine with a GPU"

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
	$(BIN)/python -m docs.make_drawings

# The tests build it too.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Needs no .venv: the Python of a GPU machine serves that has the run-time dependencies, pytest and hypothesis.
gpu:
	@found=$$($(PYTHON) -c "import torch; print(torch.cuda.is_available())") || exit 1; \
	  if [ "$$found" != True ]; then echo "make gpu: torch sees no GPU here, nothing to check"; exit 0; fi; \
	  SPARSEFLASH_TEST_BACKEND=triton SPARSEFLASH_EXAMPLES=100 PYTHONPATH=. \
	     $(PYTHON) -m pytest tests/kernels/numerics tests/test_attention_laws.py \
	     tests/test_attention_features.py tests/test_heavy_lines.py tests/test_dynamic_tables.py tests/test_decode.py tests/test_routing.py tests/test_cuda_graphs.py

clean:
	rm -rf .venv dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
