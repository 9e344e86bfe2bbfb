"""The public names, their documentation, and the direction of imports."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import sparseflash as sf
from sparseflash import patterns

ROOT = Path(__file__).parent.parent
CORE = ("functional", "reference", "routing", "tables", "utils")
OUTER = (
    *("cli", "distributed", "flex", "integrations", "lra", "models", "nn", "pathfinder", "pictures", "tools", "train"),
)


def modules() -> list[str]:
    """Every module of the package by its import name; the kernels that need Triton only where it is there."""
    names = [m.name for m in pkgutil.walk_packages(sf.__path__, "sparseflash.") if not m.name.endswith("__main__")]
    names += [f"sparseflash.kernels.{p.stem}" for p in sorted((ROOT / "kernels").glob("*.py"))]
    return sorted({*names} - {"sparseflash.ops"})  # which warns


@pytest.mark.parametrize("module", [sf, patterns])
def test_all_is_sorted_and_complete(module: ModuleType) -> None:
    assert list(module.__all__) == sorted(module.__all__)
    assert all(hasattr(module, name) for name in module.__all__)
    public = {n for n, v in vars(module).items() if not n.startswith("_") and not inspect.ismodule(v)}
    assert public <= set(module.__all__) | {"annotations", "import_module", "TYPE_CHECKING"}
    with pytest.raises(AttributeError, match="has no attribute 'atention'"):
        _ = module.atention


@pytest.mark.parametrize("name", [n for n in sf.__all__ if callable(getattr(sf, n))])
def test_public_names_are_documented(name: str) -> None:
    text = inspect.getdoc(getattr(sf, name)) or ""
    assert len(text.split()) >= 8, f"{name} has no docstring to speak of"


@pytest.mark.parametrize("name", [n for n in patterns.__all__ if n not in ("BlockMask", "Grid", "Pattern", "parse")])
def test_patterns_show_an_example(name: str) -> None:
    assert ">>>" in (getattr(patterns, name).__doc__ or "")


@pytest.mark.parametrize("name", [m for m in modules() if "triton" not in m])
def test_examples_in_docstrings_run(name: str) -> None:
    if name in ("sparseflash.integrations.diffusers", "sparseflash.integrations.transformers"):
        needed = name.rpartition(".")[2]
        pytest.importorskip(needed, reason=f"{needed} is not installed")
    module = importlib.import_module(name)
    # doctest finds functions by module attribute; patterns/__init__ re-exports functions under module names.
    module = sys.modules[name]
    failed, _ = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def imported(path: Path) -> set[str]:
    """Names of the modules that a file imports at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def test_the_former_address_of_the_operators_works_and_warns() -> None:
    code = "import warnings; warnings.simplefilter('error'); import sparseflash.ops"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "DeprecationWarning: sparseflash.ops is now sparseflash.functional.operators" in done.stderr
    code = "import sparseflash.ops, torch; torch.ops.sparseflash.attention.default"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_arrows_go_one_way() -> None:
    for path in (ROOT / "patterns").glob("*.py"):
        # A mask is drawn by packages that patterns do without, so its methods import the pictures when called.
        ours = ("sparseflash.patterns", *["sparseflash.pictures"] * (path.name == "block_mask.py"))
        for name in imported(path):
            assert not name.startswith("torch"), f"{path}: patterns know nothing of torch"
            assert not name.startswith("sparseflash") or name.startswith(ours), f"{path}: {name}"
    for path in (ROOT / "sparseflash/pictures").glob("*.py"):
        for name in imported(path):
            ours = "sparseflash.patterns", "sparseflash.pictures"
            assert not name.startswith("sparseflash") or name.startswith(ours), f"{path}: {name}"
    for path in (path for room in ("", "triton", "candidates") for path in (ROOT / "kernels" / room).glob("*.py")):
        for name in imported(path):
            assert not name.startswith("sparseflash") or name.startswith("sparseflash.kernels"), f"{path}: {name}"
    for room in CORE:
        files = [*(ROOT / "sparseflash" / room).glob("*.py"), *(ROOT / "sparseflash").glob(f"{room}.py")]
        assert files, room
        for path in files:
            for name in imported(path):
                assert not name.startswith(tuple(f"sparseflash.{o}" for o in OUTER)), f"{path}: {name}"


def private_imports(source: str, room: str) -> set[str]:
    """Names that begin with an underscore, of modules of ours in another folder than ``room``."""
    return {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sparseflash")
        for alias in node.names
        if alias.name.startswith("_") and not alias.name.startswith("__")
        if room not in (node.module, str(node.module).rpartition(".")[0])
    }


def test_no_room_imports_what_is_private_to_another() -> None:
    source = "from sparseflash.tables.lookup import _a, b"
    assert private_imports(source, "sparseflash.nn") == {"sparseflash.tables.lookup._a"}
    assert not private_imports(source, "sparseflash.tables")
    files = [
        path for folder in ("patterns", "kernels", "sparseflash", "benchmarks") for path in (ROOT / folder).rglob("*")
    ]
    for path in (path for path in files if path.suffix == ".py"):
        parts = path.relative_to(ROOT).parent.parts
        room = ".".join(("sparseflash", *parts) if parts[0] in ("patterns", "kernels") else parts)
        assert not private_imports(path.read_text(), room), path


def test_patterns_need_numpy_and_scipy_alone() -> None:
    """What else they use is imported inside of functions: to write a file, to show a bar, to draw."""
    others = "torch", "triton", "matplotlib", "PIL", "rich", "safetensors", "sparseflash.pictures"
    for path in (ROOT / "patterns").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = (
                [a.name for a in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None) or ""]
            )
            for root in {name.partition(".")[0] for name in names} - {""}:
                assert root in sys.stdlib_module_names | {"numpy", "scipy", "sparseflash"}, f"{path}: {root}"
    code = f"""import sys; from sparseflash import patterns as P
mask = (P.causal() & P.local(9)).compile(100); P.BlockMask.from_scipy(mask.to_scipy(), 100, tiles=mask.tiles).to_dense()
print([name for name in {others} if name in sys.modules])"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


def test_importing_the_package_is_light() -> None:
    """Nothing slow until it is asked for; triton only when a kernel is."""
    loaded = "print([m for m in ('torch', 'triton', 'matplotlib', 'typer') if m in sys.modules])"
    code = f"import sys, sparseflash; {loaded}; sparseflash.attention; {loaded}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == ["[]", "['torch']"]


def test_the_kernels_folder_does_not_shadow_a_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
