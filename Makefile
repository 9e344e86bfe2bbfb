# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test lint types tests gallery gpu kills audit sbom release clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   every check: ruff, mypy --strict, pytest"
	@echo "make lint | types | tests   one of the checks"
	@echo "make gallery  docs/gallery.md and its pictures, drawn again"
	@echo "make kills  50 runs killed, interrupted, out of disk: what the suite does with four, in some minutes"
	@echo "make release  wheel and sdist, after a look for known faults (audit), with a list of what it was tested with (sbom)"
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

# Needs no .venv: the Python of a GPU machine serves that has the run-time dependencies, pytest and hypothesis.
gpu:
	@found=$$($(PYTHON) -c "import torch; print(torch.cuda.is_available())") || exit 1; \
	  if [ "$$found" != True ]; then echo "make gpu: torch sees no GPU here, nothing to check"; exit 0; fi; \
	  SPARSEFLASH_TEST_BACKEND=triton SPARSEFLASH_EXAMPLES=100 PYTHONPATH=. \
	     $(PYTHON) -m pytest tests/kernels/numerics tests/test_attention_laws.py \
	     tests/test_attention_features.py tests/test_heavy_lines.py tests/test_dynamic_tables.py tests/test_decode.py tests/test_routing.py tests/test_cuda_graphs.py

# FULL and READONLY mount a small file system of their own; DEATHS and BY change how often and by what.
DEATHS ?= 50
BY ?= KILL INT TERM FULL READONLY
kills: .venv/ready
	unshare -Urm $(BIN)/python -m tests.train.killing --deaths $(DEATHS) --by $(BY)

# A package that the vulnerability service does not know is a failure too: unseen is not clean.
.venv-release/ready: constraints-release.txt
	$(PYTHON) -m venv .venv-release
	.venv-release/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-release.txt
	@touch $@

audit: .venv-release/ready
	.venv-release/bin/pip-audit --strict --no-deps --disable-pip -r constraints.txt

sbom: .venv-release/ready
	mkdir -p dist
	.venv-release/bin/cyclonedx-py requirements --pyproject pyproject.toml --mc-type library --output-reproducible \
	  --of JSON -o dist/sparseflash.cdx.json constraints.txt

release: .venv/ready audit sbom
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --outdir dist

clean:
	rm -rf .venv .venv-release dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis
