"""The bounds that SECURITY.md promises are those of the code."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from sparseflash.lra import cifar, documents, lines, listops
from sparseflash.models import json_config
from sparseflash.pathfinder import geometry, metadata, reader, targets
from sparseflash.patterns import mask_file, parsing
from sparseflash.train import config, logs, sequences
from sparseflash.utils import untrusted as foreign

PAGE = (Path(__file__).parents[2] / "SECURITY.md").read_text()
ROWS = dict(re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", PAGE, re.MULTILINE))
MB = 1 << 20
WHOLE, MODEL, TREE = geometry._WHOLE, json_config.MOST, listops._LIMITS
BOUNDS: dict[str, list[Any]] = {
    "JSON": [f"{foreign.MOST_BYTES // MB} MB"],
    "presets": [f"{foreign.MOST_TOML // MB} MB", f"{foreign.MOST_PARTS} parts"],
    "expressions": [parsing.MAX_CHARACTERS, parsing.MAX_DEPTH, parsing.MAX_OPERATORS],
    "mask files": [f"a header of {mask_file.MAX_HEADER // MB} MB"],
    "weights": [f"{foreign.MOST_BYTES // MB} MB"],
    "model configs": [MODEL[name] for name in ("width", "heads", "layers", "mlp_width", "classes")],
    "recipes": [config._MOST_WEIGHTS, config.MOST_BATCH, config._MOST_TOKENS, config._MOST_STAGES,
                sequences.MOST_TOKENS],
    "geometries": [WHOLE["size"][1], WHOLE["num_distractors"][1], WHOLE["contour_length"][1],
                   WHOLE["paddle_length"][1], geometry._MAX_MARGINS, WHOLE["antialias"][1], geometry._MAX_CELLS],
    "grammars": [TREE["max_depth"], TREE["max_args"], TREE["min_length"], TREE["max_length"], listops._BUDGET],
    "logs": [f"{logs.MOST_BYTES >> 30} GB", logs.MOST_LINES, logs.MOST_LINE],
    "image metadata": [metadata._MAX_ROWS, reader._MAX_IMAGES, reader._MAX_SUBFOLDERS, metadata._MAX_NAME],
    "PNG": [f"{foreign.MOST_BYTES // MB} MB", reader._MAX_SIDE],
    "lines": [lines.MOST_LINES, f"{lines.MOST_LINE // MB} MB"],
    "reviews": [documents.MOST_REVIEWS, f"{foreign.MOST_BYTES // MB} MB"],
    "CIFAR": [cifar.MOST_RECORDS],
}  # fmt: skip


@pytest.mark.parametrize("what", BOUNDS)
def test_the_page_tells_the_bounds_of_the_code(what: str) -> None:
    (row,) = [text for name, text in ROWS.items() if name.startswith(what)]
    for bound in BOUNDS[what]:
        words = f"{bound:,}" if isinstance(bound, int) else bound
        assert re.search(rf"(?<![\d,]){re.escape(words)}(?![\d,]*\d)", row), f"{what}: {words} is not in {row!r}"


def test_attempts_that_are_given_up_are_told() -> None:
    assert f"{targets.MAX_ATTEMPTS:,} attempts" in PAGE
