# Two commands do everything: `make demo` and `make test`. Both create .venv on first use.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: help demo test test-all lint types interpreted sweep gallery docs versions gpu fuzz coverage mutants sanitize kills audit sbom release clean
help:
	@echo "make demo   a tour in under 6 minutes on 2 cores: mask, exactness, speed, training"
	@echo "make test   ruff, mypy --strict, and the first tier of the tests, within 8 minutes on 2 cores"
	@echo "make test-all   every test: what .ci/run runs"
	@echo "make lint | types | interpreted   one of the checks; the laws on the Triton kernels in Triton's interpreter"
	@echo "make sweep  every text family of Transformers against its eager attention, ten minutes of a core"
	@echo "make gallery  docs/gallery.md, its pictures, the drawings of the tables and the front page, and the tables of docs/presets.md"
	@echo "make docs   the documentation site in build/site, every warning an error"
	@echo "make gpu    everything that waits for a GPU, in parts: PART=check, kernels, step or peers; see docs/gpu.md"
	@echo "make fuzz MINUTES=n [TARGET=a,b]  the laws on new and wider cases, n minutes a target"
	@echo "make coverage  what the tests of patterns, tables and the CPU backend leave untried"
	@echo "make mutants OF=patterns [EVERY=n]  small changes there that its tests do not notice, by cosmic-ray"
	@echo "make sanitize [PROBLEMS=n]  the compiled CPU kernel under AddressSanitizer and UBSan"
	@echo "make kills  50 runs killed, interrupted, out of disk, two at once: what the suite does with four, in some minutes"
	@echo "make release  wheels and sdist, after a look for known faults (audit), with a list of what it was tested with (sbom)"
	@echo "make versions  the tests that meet torch and Triton, on every supported pair of them (TORCH=2.11.0: on one)"

# Compiles the CPU kernel too: again where its sources changed.
.venv/ready: pyproject.toml constraints.txt hatch_build.py $(wildcard kernels/cpu/*.h kernels/cpu/*.cpp)
	$(PYTHON) -m venv .venv
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: .venv/ready
	$(BIN)/sparseflash demo

# The first tier tries each law on fewer examples.
test: lint types
	SPARSEFLASH_EXAMPLES=25 $(BIN)/python -m pytest -n 2 -m "not alone and not tier2"
	$(INTERPRETER) $(BIN)/python -m pytest -n 2 -m "interpreted and not tier2" tests/laws

test-all: lint types
	$(BIN)/python -m pytest -n 2 -m "not alone"
	$(BIN)/python -m pytest -m alone
	$(MAKE) interpreted

# Triton decides when it is imported whether it interprets, so this takes processes of its own.
INTERPRETER := TRITON_INTERPRET=1 SPARSEFLASH_TEST_BACKEND=triton CUDA_VISIBLE_DEVICES=
interpreted: .venv/ready
	$(INTERPRETER) $(BIN)/python -m pytest -n 2 -m interpreted tests/laws

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# After a change of the integration, and for a new version of Transformers; a part of test-all.
sweep: .venv/ready
	$(BIN)/python -m pytest -n 2 -m sweep tests/integrations/test_families.py

gallery: .venv/ready
	$(BIN)/python -m docs.make_gallery
	$(BIN)/python -m docs.make_drawings
	$(BIN)/python -m docs.make_front
	$(BIN)/python -m docs.make_presets
	$(BIN)/python -m docs.make_families

# The tests build it too.
docs: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# Each pair in an environment of its own under .venvs, several GB with CUDA.
versions:
	$(PYTHON) -m tests.versions $(if $(TORCH),--only $(TORCH))

# Needs no .venv: the Python of a GPU machine serves that has the run-time dependencies, pytest and hypothesis.
gpu:
	@PYTHONPATH=. $(PYTHON) -m benchmarks.gpu $(PART)

# The suite's laws on new and wider cases, MINUTES of processor time for each target; findings lie in fuzz-findings/.
MINUTES ?= 1
fuzz: .venv/ready
	PYTHONPATH=. $(BIN)/python -m tests.fuzz --minutes $(MINUTES) $(if $(TARGET),--target $(TARGET))

# What the tests of patterns, tables and the CPU backend leave untried.
COVERING := tests/laws $(patsubst %,tests/test_%.py,parsing mask_files conversions robustness where bad_input checking \
  beside_and_packed grids seen waste drawing viewer text_at_random operators cpu_kernel attention_features dropout)
coverage: .venv/ready
	PYTHONPATH=. $(BIN)/python -m coverage run -m pytest $(COVERING)
	$(BIN)/python -m coverage report

# Which small changes there they do not notice: modules or folders, every n-th change.
OF ?= patterns sparseflash/tables kernels/cpu
EVERY ?= 100
.venv-mutants/ready: constraints-mutants.txt
	$(PYTHON) -m venv .venv-mutants
	.venv-mutants/bin/python -m pip install --quiet --disable-pip-version-check -r constraints-mutants.txt
	@touch $@

mutants: .venv/ready .venv-mutants/ready
	$(BIN)/python -m tests.mutation $(OF) --every $(EVERY)

# The compiled CPU kernel under AddressSanitizer and UBSan, on so many problems for each level that this machine runs.
PROBLEMS ?= 300
sanitize: .venv/ready
	SPARSEFLASH_SANITIZE=$(PROBLEMS) $(BIN)/python -m pytest tests/kernels/test_cpu_sanitizers.py

# FULL and READONLY mount a small file system of their own; DEATHS and BY change how often and by what.
DEATHS ?= 50
BY ?= KILL INT TERM FULL READONLY TWO
kills: .venv/ready
	unshare -Urm $(BIN)/python -m tests.train.crash --deaths $(DEATHS) --by $(BY)

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

# The sdist, a wheel with the CPU kernel for each machine that ziglang compiles for, and one without for all others.
TARGETS ?= linux-x86_64 linux-aarch64 macos-arm64
release: .venv/ready audit sbom
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m build --sdist --outdir dist
	for target in $(TARGETS); do \
	  PIP_CONSTRAINT=constraints.txt SPARSEFLASH_TARGET=$$target $(BIN)/python -m build --wheel --outdir dist || exit 1; done
	PIP_CONSTRAINT=constraints.txt SPARSEFLASH_BUILD=none $(BIN)/python -m build --wheel --outdir dist
	.venv-release/bin/twine check --strict dist/*.tar.gz dist/*.whl

clean:
	rm -rf .venv .venvs .venv-release dist build fuzz-findings .coverage .mypy_cache .ruff_cache .pytest_cache .hypothesis
