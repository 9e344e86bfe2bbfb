"""`sparseflash doctor` on the kernel that a CPU runs: which, why no better one, and what makes it faster."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from sparseflash.cli import app
from sparseflash.kernels.cpu import build, levels, native
from sparseflash.tools.doctor import CpuKernel, examine

RUN_HERE = [level.name for level in levels.runnable(native.capabilities())]
Chosen = Callable[[str], CpuKernel]


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Chosen]:
    """What doctor finds with a value of the environment variable."""

    def found(value: str) -> CpuKernel:
        monkeypatch.setenv(native.VARIABLE, value)
        native._best.cache_clear()
        return examine().cpu_kernel

    yield found
    native._best.cache_clear()


def test_the_best_that_was_compiled_serves(chosen: Chosen) -> None:
    assert chosen("") == CpuKernel(RUN_HERE[-1], levels.runnable(native.capabilities())[-1].gives, None, None)


@pytest.mark.parametrize("name", [*RUN_HERE[:-1], native.PLAIN])
def test_one_that_was_asked_for(name: str, chosen: Chosen) -> None:
    kernel = chosen(name)
    assert kernel.name == name
    assert kernel.why is not None
    assert f"SPARSEFLASH_CPU={name} asks for" in kernel.why
    assert kernel.faster == "unset SPARSEFLASH_CPU"
    told = CliRunner().invoke(app, ["doctor"], env={"COLUMNS": "60"}).stdout
    assert f"CPU kernel                {name}: " in told
    assert "\nFaster on a CPU: unset SPARSEFLASH_CPU\n" in told
    said = json.loads(CliRunner().invoke(app, ["doctor", "--json"]).stdout)["cpu_kernel"]
    assert said == {"name": name, "gives": kernel.gives, "why": kernel.why, "faster": kernel.faster}


def test_nothing_was_compiled(chosen: Chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(levels, "FOLDER", tmp_path)
    kernel = chosen("")
    assert (kernel.name, kernel.why) == ("plain", f"{tmp_path / RUN_HERE[-1]}{levels.SUFFIX} is not there")
    assert kernel.faster is not None
    assert Path(kernel.faster.split()[-1]).samefile(build.__file__)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    bare = chosen("").faster
    assert bare is not None
    assert ("pip install ziglang && " in bare) == (find_spec("ziglang") is None)


def test_what_was_compiled_is_of_other_sources(chosen: Chosen, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The best is refused, and the next one serves."""
    monkeypatch.setattr(levels, "FOLDER", tmp_path)
    for level, name in zip(levels.runnable(native.capabilities()), RUN_HERE, strict=True):
        built = (Path(build.__file__).parent / "libraries" / f"{name}{levels.SUFFIX}").read_bytes()
        stamp = build.digest(level).encode()
        assert built.count(stamp) == 1
        level.library.write_bytes(built.replace(stamp, stamp[::-1]) if name == RUN_HERE[-1] else built)
    kernel = chosen("")
    assert kernel.name == (native.PLAIN, *RUN_HERE)[-2]
    assert kernel.why == f"{tmp_path / RUN_HERE[-1]}{levels.SUFFIX} is of other sources than those beside it"
    with pytest.raises(ValueError, match=r"asks for what cannot serve: .* is of other sources"):
        chosen(RUN_HERE[-1])


def test_what_no_processor_has_is_refused(chosen: Chosen) -> None:
    with pytest.raises(ValueError, match="SPARSEFLASH_CPU must be 'plain' or one of") as refusal:
        chosen("z80")
    assert all(repr(name) in str(refusal.value) for name in RUN_HERE)
