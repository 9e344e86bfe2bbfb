"""Every promise of docs/trust.md names a test that is there, and is run."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
LINK = re.compile(r"\[`(test_\w+)`\]\(\.\./([\w/]+\.py)\)")


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    (section,) = re.findall(r"^## Promises\n(.*?)^## ", (ROOT / "docs/trust.md").read_text(), re.M | re.S)
    promises = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert len(promises) >= 10
    for promise in promises:
        links = LINK.findall(promise)
        assert links, f"no test holds: {promise}"
        assert len(links) == promise.count("[`"), f"not a link to a test: {promise}"
        for name, file in links:
            there = {node.name: node for node in ast.parse((ROOT / file).read_text()).body if hasattr(node, "name")}
            assert name in there, f"{file} has no {name}"
            marks = [ast.unparse(mark) for mark in there[name].decorator_list]
            assert not any(mark.startswith(("pytest.mark.skip(", "pytest.mark.xfail")) for mark in marks), name
