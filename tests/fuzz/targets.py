"""What a campaign may be aimed at: laws of the suite, grouped."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Target:
    """Laws that are run in turn.

    Attributes:
        files: test files, of which the hypothesis tests are taken.
        only: words of a pytest ``-k`` expression; empty for all of them.
        examples: cases of a law before it is the next one's turn.
        environment: of the process.
    """

    files: tuple[str, ...]
    only: str = ""
    examples: int = 50
    environment: dict[str, str] = field(default_factory=dict)


INTERPRETER = {"TRITON_INTERPRET": "1", "SPARSEFLASH_TEST_BACKEND": "triton", "CUDA_VISIBLE_DEVICES": ""}
OPERATOR = ("tests/laws/test_attention_laws.py", "tests/laws/test_decode.py")
DYNAMIC = "tests/laws/test_dynamic_tables.py"

TARGETS = {
    "patterns": Target(
        ("tests/laws/test_pattern_laws.py", "tests/test_robustness.py", "tests/test_conversions.py"), "not law_4"
    ),
    "parser": Target(("tests/test_text_at_random.py", "tests/laws/test_pattern_laws.py"), "text", 300),
    "files": Target(("tests/test_files_at_random.py", "tests/test_mask_files.py"), examples=100),
    "folders": Target(("tests/test_folders_at_random.py",)),
    "tables": Target(
        (
            "tests/laws/test_pattern_laws.py",
            "tests/test_checking.py",
            "tests/laws/test_schedule.py",
            "tests/test_operators.py",
        ),
        "law_4 or test_checking or test_schedule or test_operators",
    ),
    "operator": Target((*OPERATOR, "tests/test_cpu_kernel.py", "tests/laws/test_cache_law.py")),
    "operator-triton": Target((*OPERATOR, DYNAMIC, "tests/laws/kernels"), "not lists", 4, INTERPRETER),
    "dynamic": Target((DYNAMIC, "tests/test_routing.py")),
    "distributed": Target(
        ("tests/distributed/test_sharding.py", "tests/distributed/test_context_parallel.py"), "not spawn"
    ),
}


def chosen(name: str) -> Target:
    """A target by its name; a test file is one too.

    Raises:
        ValueError: neither is called so.
    """
    if name in TARGETS:
        return TARGETS[name]
    if Path(name).suffix == ".py" and Path(name).is_file():
        return Target((name,))
    raise ValueError(f"TARGET must be of {', '.join(TARGETS)}, or a test file; got {name!r}")
