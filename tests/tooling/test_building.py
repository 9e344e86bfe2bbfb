"""What installing does about the CPU kernel: with a compiler, without one, with one that fails; and what is built."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from sparseflash.kernels.cpu import build, elf, levels

ROOT = Path(__file__).parents[2]
LEVELS = [level.name for level in levels.levels_of(levels.machine())]
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads ELF")
# libpthread is a part of the C library, of its own in those before glibc 2.34.
OF_C = re.compile(r"lib[cm]\.so\.6|libpthread\.so\.0|ld-linux[\w.-]*")

# A compiler that is quick: it takes what is compiled already, notes what it was asked for, and fails where told to.
COMPILER = """#!{python}
import pathlib, re, sys
folder, built = pathlib.Path(__file__).parent, pathlib.Path({built!r})
asked = " ".join(sys.argv)
if any(flag in asked for flag in {refused!r}):
    sys.exit("kernel.cpp:1: note: something\\ncc1plus: error: unrecognized option\\nand more lines")
out = pathlib.Path(sys.argv[sys.argv.index("-o") + 1])
stamp = re.search("sparseflash [0-9a-f]{{64}}", asked).group()
out.write_bytes(re.sub(rb"sparseflash [0-9a-f]{{64}}", stamp.encode(), (built / out.name).read_bytes()))
with (folder / "log").open("a") as log:
    print(out.stem, file=log)
"""
NO_ZIGLANG = "import sys; sys.modules['ziglang'] = None"
BUILD = f"{NO_ZIGLANG}; from hatchling.cli import hatchling; sys.exit(hatchling())"
Hatched = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what a wheel is built from, without libraries."""
    copy = tmp_path / "checkout"
    shutil.copytree(
        ROOT / "sparseflash", copy / "sparseflash", ignore=shutil.ignore_patterns("libraries", "__pycache__")
    )
    for name in ("pyproject.toml", "hatch_build.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture
def hatched(checkout: Path, tmp_path: Path) -> Hatched:
    """Build a wheel where there is no compiler but the one that is named, and no index."""

    def built(**environment: str) -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEFLASH", "CXX"))}
        kept |= {"PATH": str(tmp_path / "nowhere"), "PIP_NO_INDEX": "1"} | environment
        command = [sys.executable, "-c", BUILD, "build", "-t", "wheel", "-d", str(tmp_path / "dist")]
        return subprocess.run(command, cwd=checkout, env=kept, capture_output=True, text=True, check=False)

    return built


def compiler(folder: Path, *refused: str) -> str:
    """The command of a quick compiler that fails where one of these flags is given."""
    path = folder / "compiler"
    libraries = str(ROOT / "kernels" / "cpu" / "libraries")
    path.write_text(COMPILER.format(python=sys.executable, built=libraries, refused=refused))
    path.chmod(0o755)
    return str(path)


def carried(folder: Path) -> tuple[str, list[str]]:
    """The name of the only wheel of a folder, and the levels that it carries."""
    (wheel,) = folder.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    return wheel.name, sorted(Path(name).stem for name in names if "/libraries/" in name)


def lines(done: subprocess.CompletedProcess[str]) -> list[str]:
    return [line for line in (done.stdout + done.stderr).splitlines() if "sparseflash: " in line]


def test_without_a_compiler_one_line_says_so(hatched: Hatched, tmp_path: Path) -> None:
    done = hatched()
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert line.startswith("sparseflash: the CPU kernel was not compiled (no C++ compiler: set CXX, or install g++,")
    assert "attention on a CPU runs in torch" in line
    name, libraries = carried(tmp_path / "dist")
    assert name.endswith("-py3-none-any.whl")
    assert libraries == []


def test_a_compiler_that_fails_is_quoted(hatched: Hatched, tmp_path: Path) -> None:
    done = hatched(CXX=compiler(tmp_path, "kernel.cpp"))
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert "(cc1plus: error: unrecognized option)" in line
    assert carried(tmp_path / "dist")[0].endswith("-py3-none-any.whl")
    missing = hatched(CXX="no-such-compiler")
    assert "No such file or directory: 'no-such-compiler'" in lines(missing)[0]


def test_where_the_kernel_is_required_its_absence_is_an_error(hatched: Hatched, tmp_path: Path) -> None:
    done = hatched(SPARSEFLASH_BUILD="require")
    assert done.returncode != 0
    assert "RuntimeError: sparseflash: the CPU kernel was not compiled (no C++ compiler" in done.stderr
    assert not list(tmp_path.glob("dist/*"))


@pytest.mark.parametrize("variable", ["SPARSEFLASH_BUILD", "SPARSEFLASH_TARGET"])
def test_a_wish_that_is_not_known_is_refused(variable: str, hatched: Hatched) -> None:
    done = hatched(**{variable: "pdp-11"})
    assert done.returncode != 0
    known = {
        "SPARSEFLASH_BUILD": "auto, require, none",
        "SPARSEFLASH_TARGET": "linux-x86_64, linux-aarch64, macos-arm64",
    }
    assert f"ValueError: {variable} must be one of {known[variable]}; got 'pdp-11'" in done.stderr


@ON_LINUX
def test_what_is_there_is_not_compiled_again_and_what_is_of_other_sources_is(
    hatched: Hatched, checkout: Path, tmp_path: Path
) -> None:
    command, log = compiler(tmp_path), tmp_path / "log"
    for changed, compiled in ((False, LEVELS), (False, []), (True, LEVELS)):
        log.write_text("")
        if changed:
            with (checkout / "sparseflash" / "kernels" / "cpu" / "vectors.h").open("a") as header:
                header.write("// changed\n")
        done = hatched(CXX=command)
        assert done.returncode == 0, done.stderr
        assert sorted(log.read_text().split()) == sorted(compiled)
        name, libraries = carried(tmp_path / "dist")
        assert re.search(r"-py3-none-manylinux_2_\d+_\w+\.whl$", name)
        assert libraries == sorted(LEVELS)
    # The pure wheel, though libraries lie there.
    shutil.rmtree(tmp_path / "dist")
    assert hatched(SPARSEFLASH_BUILD="none").returncode == 0
    name, libraries = carried(tmp_path / "dist")
    assert name.endswith("-py3-none-any.whl")
    assert libraries == []


@pytest.mark.skipif(levels.machine() != "x86_64", reason="a level of x86-64")
def test_a_compiler_that_is_too_old_for_one_level_compiles_the_others(hatched: Hatched, tmp_path: Path) -> None:
    done = hatched(CXX=compiler(tmp_path, "-mavx512bf16"))
    assert done.returncode == 0, done.stderr
    (line,) = lines(done)
    assert line.startswith(
        "sparseflash: x86-64-v4-bf16, x86-64-amx of the CPU kernel was not compiled (cc1plus: error:"
    )
    assert "a lesser one serves" in line
    assert carried(tmp_path / "dist")[1] == ["x86-64-v3", "x86-64-v4"]


def test_ziglang_is_asked_for_where_nothing_else_compiles_and_pip_has_it(checkout: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "ziglang-0.17.1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("ziglang-0.17.1.dist-info/METADATA", "Metadata-Version: 2.1\nName: ziglang\nVersion: 0.17.1\n")
        wheel.writestr("ziglang-0.17.1.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        wheel.writestr("ziglang-0.17.1.dist-info/RECORD", "")
    say = "import hatchling.build; print(hatchling.build.get_requires_for_build_wheel())"

    def asked(**environment: str) -> str:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("SPARSEFLASH", "CXX", "PIP"))}
        kept |= {"PATH": "", "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)} | environment
        command = [sys.executable, "-c", f"{NO_ZIGLANG}; {say}"]
        done = subprocess.run(command, cwd=checkout, env=kept, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert asked() == "['ziglang>=0.13']"
    assert asked(SPARSEFLASH_TARGET="macos-arm64", CXX="g++") == "['ziglang>=0.13']"
    assert asked(CXX="g++") == "[]"
    assert asked(SPARSEFLASH_BUILD="none") == "[]"
    assert asked(PIP_FIND_LINKS=str(checkout)) == "[]"


@ON_LINUX
@pytest.mark.parametrize("name", LEVELS)
def test_a_library_needs_the_c_library_alone(name: str) -> None:
    """No C++ runtime, no library of the compiler's, nothing of torch."""
    (level,) = (level for level in levels.LEVELS if level.name == name)
    assert build.current(level), "compile it: python kernels/cpu/build.py"
    found = elf.needs(level.library)
    assert found.libraries
    assert [each for each in found.libraries if not OF_C.fullmatch(each)] == []
    assert [each for each in found.versions if not each.startswith("GLIBC_")] == []
    assert found.glibc is not None


@ON_LINUX
def test_what_a_library_needs_is_read_from_its_file(tmp_path: Path) -> None:
    found = elf.needs(Path(sys.modules["torch"].__file__ or "").parent / "lib" / "libc10.so")
    assert "libstdc++.so.6" in found.libraries
    assert any(version.startswith("GLIBCXX_") for version in found.versions)
    assert found.glibc is not None
    assert found.glibc >= (2, 17)
    text = tmp_path / "text.so"
    text.write_text("no library")
    with pytest.raises(ValueError, match="must be a 64-bit little-endian ELF file; it begins with b'no lib'"):
        elf.needs(text)
    assert elf.Needs((), ("GLIBC_2.9", "GLIBC_2.2.5", "GLIBC_2.28", "CXXABI_1.3")).glibc == (2, 28)
    assert elf.Needs((), ()).glibc is None
