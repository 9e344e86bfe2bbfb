"""Whole training steps, tiny: every attention takes them, dense ones with one loss, and a measurement goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import step, tables
from benchmarks.steps import settings
from benchmarks.steps.models import ATTENTIONS, WITHOUT, Sequences, build
from benchmarks.steps.settings import Setting

pytestmark = pytest.mark.tier2

pytest.importorskip("transformers", reason="transformers is not installed")

NARROW = "local(16) | butterfly(unit=16)"
TINY = (
    Setting("gpt2", "gpt2", 96, 2, 1, 32, 2, NARROW, 16, 64),
    Setting("bert", "bert", 64, 2, 1, 32, 2, "local(8)", 16, 64),
    Setting("lra", "lra", 128, 2, 1, 32, 2, NARROW, 16, 64),
    Setting("path256", "path256", 48 * 48, 1, 1, 32, 2, settings.TILES, 128),
)


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("step") / "step.json"
    said: list[str] = []
    assert step.run(out=out, runs=2, device="cpu", settings=TINY, say=said.append) == out
    assert len(said) == len(TINY) * len(ATTENTIONS)
    return out


def test_every_model_takes_steps_through_every_attention(measured: Path) -> None:
    found = json.loads(measured.read_text())
    assert found["part"] == "step"
    assert found["transformers"] != "absent"
    for setting in TINY:
        rows = {row["attention"]: row for row in found["rows"] if row["model"] == setting.model}
        assert tuple(rows) == ATTENTIONS
        for name, row in rows.items():
            assert row["runs"] == 2
            assert row["step_ms"] > 0
            assert row["over_sdpa"] == pytest.approx(rows["sdpa"]["step_ms"] / row["step_ms"])
            assert 0 <= row["attention_share"] < 1
            assert row["dtype"] == "float32"
            if name != "ours sparse":
                assert row["loss"] == pytest.approx(rows["eager"]["loss"], rel=1e-5)
        assert rows["ours sparse"]["loss"] != rows["eager"]["loss"]
        assert rows["ours sparse"]["density"] < rows["ours dense"]["density"] <= 1
        assert "density" not in rows["sdpa"]
    (shape,) = tables.SHAPES["step"]
    assert tables.table(shape.columns, found["rows"]).count("\n") == 1 + len(found["rows"])


def test_the_same_line_again_measures_what_is_missing(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = json.loads(measured.read_text())["rows"]

    def refuse(setting: Setting, *_: Any) -> list[dict[str, Any]]:
        raise AssertionError(f"{setting.model} was measured before")

    said: list[str] = []
    monkeypatch.setattr(step, "measure", refuse)
    step.run(out=measured, device="cpu", settings=TINY, say=said.append)
    more = (*TINY, Setting("another", "lra", 128, 2, 1, 32, 2, NARROW, 16, 64))
    step.run(out=measured, device="cpu", settings=more, seconds=-1, say=said.append)
    assert said == ["time is up: run it again for the rest"]
    monkeypatch.setattr(step, "measure", lambda *_: (_ for _ in ()).throw(ImportError("no Transformers here")))
    step.run(out=measured, device="cpu", settings=more, say=said.append)
    assert said[1:] == ["another left out: no Transformers here"]
    assert json.loads(measured.read_text())["rows"] == before


def test_what_cannot_be_measured_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no model 'GPT-5'; there are 'GPT-2 small'"):
        step.run(only=["GPT-5"], small=True, out=tmp_path / "step.json")
    foreign = tmp_path / "foreign.json"
    foreign.write_text(measured.read_text().replace('"device": "', '"device": "another '))
    with pytest.raises(ValueError, match=r"was measured on another .*: write to another file"):
        step.run(out=foreign, device="cpu", settings=TINY)


def test_memory_that_is_not_there_leaves_an_attention_out(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Sequences.use

    def use(self: Sequences, attention: str) -> None:
        real(self, attention)
        self.outcome = _too_much if attention == "eager" else lambda: Sequences.outcome(self)  # type: ignore[method-assign]

    monkeypatch.setattr(Sequences, "use", use)
    rows = step.measure(TINY[2], torch.device("cpu"), runs=1)
    assert rows[0]["left_out"] == "out of memory"
    assert "step_ms" not in rows[0]
    assert step.described(rows[0]) == "lra, 128 tokens, eager: out of memory"
    assert all("step_ms" in row for row in rows[1:])


def _too_much() -> torch.Tensor:
    raise torch.OutOfMemoryError("not on this machine")


def test_a_token_that_sees_nothing_else_gets_its_own_value() -> None:
    """What attention's share is measured against: one token's answer does not depend on another."""
    model = build(TINY[0], torch.device("cpu"))
    model.use(WITHOUT)
    ids = torch.randint(64, (1, 96))
    other = ids.clone()
    other[0, 40] += 1 if ids[0, 40] == 0 else -1
    first, second = (model.module(input_ids=x, use_cache=False).logits[0] for x in (ids, other))
    changed = (first != second).any(-1).nonzero().flatten().tolist()
    assert changed == [40]


def test_settings_are_the_rows_of_the_paper() -> None:
    assert [setting.model for setting in settings.FULL] == [setting.model for setting in settings.SMALL]
    assert {(s.layers, s.width, s.heads) for s in settings.FULL if s.family == "gpt2"} == {
        (12, 768, 12),
        (24, 1024, 16),
    }
    path256 = settings.FULL[-1]
    assert path256.tokens == 65536
    for each in settings.FULL:
        assert each.width % each.heads == 0
