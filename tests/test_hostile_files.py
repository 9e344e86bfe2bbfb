"""Files from others are hostile until checked: nothing in them is executed, and their sizes are looked at first."""

from __future__ import annotations

import ast
import io
import json
import os
import pickle
import shutil
import struct
import time
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.lib import format as npy

import sparseflash as sf
from sparseflash import pathfinder
from sparseflash import patterns as P
from sparseflash.models import PixelTransformer, PixelTransformerConfig
from sparseflash.train import TrainConfig, load_preset, recipe
from sparseflash.train.checkpoint import latest_checkpoint, load_checkpoint
from tests.limits import little_memory

ROOT = Path(__file__).parent.parent
FOLDERS = ("sparseflash", "patterns", "kernels", "benchmarks", "examples", "docs")
SOURCES = sorted(path for name in FOLDERS for path in (ROOT / name).rglob("*.py"))

# Modules that execute what they read or unpack without asking where to, and calls that do.
MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "tarfile",
    "zipfile",
    "yaml",
}
CALLS = {"eval", "exec", "compile", "__import__"}
METHODS = {"unpack_archive", "extractall", "read_pickle", "unsafe_load", "full_load"}


def forbidden(source: str) -> list[str]:
    """What a module does that a file from others could abuse."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            plain = any(word.arg == "allow_pickle" and ast.unparse(word.value) == "False" for word in node.keywords)
            if name in CALLS or name.rpartition(".")[2] in METHODS or name == "torch.load":
                found.append(name)
            elif name in ("np.load", "numpy.load") and not plain:
                found.append(f"{name} without allow_pickle=False")
    return found


def test_nothing_executes_what_it_reads() -> None:
    assert len(SOURCES) > 100
    assert {str(path): what for path in SOURCES if (what := forbidden(path.read_text()))} == {}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "import torch\ntorch.load('x')", "np.load('x')", "eval('1')",
     "import yaml", "np.load('x', allow_pickle=True)", "shutil.unpack_archive('x')", "import tarfile as t"],
)  # fmt: skip
def test_the_search_finds(source: str) -> None:
    assert forbidden(source)


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.mark),)


SMALL = PixelTransformerConfig(pattern="local(16)", block=(16, 16), width=16, heads=1, layers=1, mlp_width=16)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with one checkpoint."""
    from sparseflash.train import train

    out = tmp_path_factory.mktemp("hostile") / "run"
    stages = tuple(replace(stage, baseline=0.5) for stage in recipe("demo").pixel_stages[:1])
    train(
        TrainConfig("demo", replace(SMALL, dense_classes=3), stages, 9, batch=1, dense_weight=1.0),
        out, steps=1, line=lambda text: None,
    )  # fmt: skip
    return out


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run" / "checkpoints" / "step-00000001"


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "optimizer.safetensors", "state.json"])
def test_pickles_in_a_checkpoint_are_never_opened(checkpoint: Path, tmp_path: Path, kind: str, name: str) -> None:
    mark = tmp_path / "executed"
    pickled(checkpoint / name, Payload(mark), kind)
    with pytest.raises(ValueError, match=r"damaged|checksum"):
        load_checkpoint(checkpoint)
    with pytest.raises(ValueError, match="no checkpoint that is whole"):
        latest_checkpoint(checkpoint.parent.parent)
    if name in ("model.safetensors", "config.json"):
        with pytest.raises(ValueError, match=r"foreign|JSON|text"):
            PixelTransformer.from_pretrained(checkpoint)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["pickle", "torch", "numpy"])
def test_pickles_as_masks_presets_and_images_are_never_opened(tmp_path: Path, kind: str) -> None:
    mark = tmp_path / "executed"
    pathfinder.write(tmp_path, 32, 2, progress=False)
    folder = tmp_path / "pathfinder32" / "curv_contour_length_14"
    image, table = folder / "imgs" / "0" / "sample_0.png", folder / "metadata" / "0.npy"
    readers: list[tuple[Path, Callable[[], object]]] = [
        (tmp_path / "mask.safetensors", lambda: P.BlockMask.load(tmp_path / "mask.safetensors")),
        (tmp_path / "preset.toml", lambda: load_preset(tmp_path / "preset.toml")),
        (image, lambda: pathfinder.read(tmp_path)),
        (table, lambda: pathfinder.read(tmp_path)),
    ]
    for path, read in readers:
        pickled(path, Payload(mark), kind)
        with pytest.raises(ValueError, match=str(tmp_path)):
            read()
    assert not mark.exists()


def pickled(path: Path, payload: Payload, kind: str) -> None:
    if kind == "pickle":
        path.write_bytes(pickle.dumps(payload))
    elif kind == "torch":
        torch.save(payload, path)
    else:
        with path.open("wb") as file:
            np.save(file, np.array([[payload]], dtype=object), allow_pickle=True)


def test_the_payload_would_have_worked(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "executed")))
    assert (tmp_path / "executed").exists()


def png(side: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A grey PNG with whatever rows and chunks."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    inner = b"".join(chunk(*each) for each in chunks)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + inner + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def test_png_bombs_are_refused_by_their_size(tmp_path: Path) -> None:
    pathfinder.write(tmp_path, 32, 2, progress=False)
    image = tmp_path / "pathfinder32" / "curv_contour_length_14" / "imgs" / "0" / "sample_0.png"
    data = pathfinder.read(tmp_path)
    rows = zlib.compress(b"\0" * 33 * 32)
    image.write_bytes(png(32, rows))
    assert (data[0][0] == 0).all(), "the picture that is made here is one"
    bombs = {
        "pixels": png(60_000, rows),
        "text": png(32, rows, (b"zTXt", b"a\0\0" + zlib.compress(b"\0" * (64 << 20)))),
        "length": png(32, rows) + bytes(17 << 20) + png(32, rows)[-12:],
    }
    for name, bomb in bombs.items():
        image.write_bytes(bomb)
        with little_memory(48), pytest.raises(ValueError, match=r"sample_0.png|1 of 2 images damaged"):
            pathfinder.read(tmp_path)[0]
        assert name != "pixels" or len(bomb) < 2000


def array_header(shape: tuple[int, ...], dtype: str) -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": dtype, "fortran_order": False, "shape": shape})
    return stream.getvalue()


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [((10**9, 11), "|S16"), ((10**9, 10**9), "|S0"), ((10**18, 11), "<U8"), ((4, 11), "<f8"), ((4,), "|S8")],
)
def test_arrays_that_promise_more_than_the_file_holds(tmp_path: Path, shape: tuple[int, ...], dtype: str) -> None:
    pathfinder.write(tmp_path, 32, 2, progress=False)
    table = tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata" / "0.npy"
    table.write_bytes(array_header(shape, dtype) + bytes(64))
    with little_memory(128), pytest.raises(ValueError, match="neither text nor a plain NumPy array"):
        pathfinder.read(tmp_path)


def test_configs_that_promise_more_than_the_weights_hold(tmp_path: Path) -> None:
    PixelTransformer(SMALL).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"width": 65536, "layers": 64, "mlp_width": 262144}))
    with little_memory(256), pytest.raises(ValueError, match="are not of the model in its config"):
        PixelTransformer.from_pretrained(tmp_path)
    for changes in ({"layers": 10**9}, {"width": 1e400}, {"layers": 2.5}, {"heads": True}, {"mlp_width": 10**30}):
        (tmp_path / "config.json").write_text(json.dumps(config | changes))
        with pytest.raises(ValueError, match=f"{next(iter(changes))} must be"):
            PixelTransformer.from_pretrained(tmp_path)


DEEP = "[" * 200_000


def test_deep_and_long_texts_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    PixelTransformer(SMALL).save_pretrained(tmp_path / "model")
    places: list[tuple[Path, Callable[[], object]]] = [
        (tmp_path / "model" / "config.json", lambda: PixelTransformer.from_pretrained(tmp_path / "model")),
        (checkpoint / "state.json", lambda: load_checkpoint(checkpoint)),
        (tmp_path / "deep.toml", lambda: load_preset(tmp_path / "deep.toml")),
    ]
    for path, read in places:
        for text in (DEEP, '{"a":' * 100_000, "a = " + DEEP, " " * (17 << 20)):
            path.write_text(text)
            with pytest.raises(ValueError, match=r"deep|foreign|preset|bytes|JSON"):
                read()


@pytest.mark.parametrize(
    "text",
    ["(" * 5000 + "full()" + ")" * 5000, "~" * 5000 + "full()", "full()" + " | full()" * 5000,
     "~(" * 9 + "full()" + (" | full()" * 150 + ")") * 9,
     "local(" + "9" * 5000 + ")",
     "local(9**9**9)", "documents(" + DEEP + ")", "x" * 2_000_000, "documents([" + "1," * 600_000 + "])",
     "local((lambda: 1)())", "__import__('os').getcwd()", "local.__class__()", "full().__class__",
     "local(__builtins__)",
     "local(10**100)", "global_tokens(1e400)", "local('a' * 10**12)", "\0", "local(1)\n" * 1000],
    ids=lambda text: text[:20],
)  # fmt: skip
def test_expressions_of_any_size_and_kind_are_refused_in_time(text: str) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (each has words of its own)
        sf.parse(text)


def test_devices_pipes_and_folders_are_not_read(checkpoint: Path, tmp_path: Path) -> None:
    pathfinder.write(tmp_path, 32, 1, progress=False)
    table = tmp_path / "pathfinder32" / "curv_contour_length_14" / "metadata" / "0.npy"
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    places: list[tuple[Path, Callable[[], object]]] = [
        (table, lambda: pathfinder.read(tmp_path)),
        (tmp_path / "mask", lambda: P.BlockMask.load(tmp_path / "mask")),
        (tmp_path / "a.toml", lambda: load_preset(tmp_path / "a.toml")),
        (checkpoint / "model.safetensors", lambda: load_checkpoint(checkpoint)),
        (checkpoint / "state.json", lambda: load_checkpoint(checkpoint)),
    ]
    for path, read in places:
        for target in (Path("/dev/zero"), pipe, tmp_path):
            path.unlink(missing_ok=True)
            path.symlink_to(target)
            with pytest.raises((ValueError, FileNotFoundError, IsADirectoryError)):
                read()


def test_a_checkpoint_with_checksums_of_its_own_is_still_checked(checkpoint: Path) -> None:
    """Checksums find accidents; whoever writes a file writes its checksum too."""
    from sparseflash.train.checkpoint import _digest

    state = json.loads((checkpoint / "state.json").read_text())
    forgeries: tuple[dict[str, object], ...] = (
        {"step": None}, {"step": -1}, {"step": 1.5}, {"progress": {"stage": 9}}, {"progress": {"since": "x"}},
        {"progress": 3}, {"config": {}}, {"config": state["config"] | {"batch": 0.5}}, {"config": "../../etc"},
        {"sha256": []}, {"config": state["config"] | {"stages": [1]}},
    )  # fmt: skip
    for changes in forgeries:
        forged = json.loads(json.dumps(state | changes))
        if isinstance(forged["sha256"], dict):
            del forged["sha256"]["state.json"]
            forged["sha256"]["state.json"] = _digest(forged)
        (checkpoint / "state.json").write_text(json.dumps(forged))
        with pytest.raises(ValueError):  # noqa: PT011 (each has words of its own)
            load_checkpoint(checkpoint)


def test_texts_of_a_mask_are_text_wherever_they_are_shown(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    P.causal().compile(64).save(tmp_path / "m", expression=attack)
    mask = P.BlockMask.load(tmp_path / "m")
    mask.write_html(tmp_path / "m.html")
    for page in ((tmp_path / "m.html").read_text(), mask._repr_html_()):
        assert "alert(1)" in page
        assert "<script>alert" not in page
        assert "<img src=x" not in page


def test_the_deepest_expressions_that_are_read_compile() -> None:
    deepest = "~(" * 8 + "local(1)" + (" | local(2)" * 29 + ")") * 8
    assert sf.parse(deepest).compile(64).nnz == 0  # the complement of a complement of ...
    assert sf.parse("~" * 240 + "causal()").compile(64) == P.causal().compile(64)


def level_folder(tmp_path: Path) -> Path:
    """A level folder of two images of 32 pixels."""
    pathfinder.write(tmp_path, 32, 2, progress=False)
    return tmp_path / "pathfinder32" / "curv_contour_length_14"


@pytest.mark.parametrize("side", [64, 13_000])
def test_a_second_header_changes_no_picture(tmp_path: Path, side: int) -> None:
    second = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    bomb = png(32, zlib.compress(bytes(33 * 32)), (b"IHDR", second))
    (level_folder(tmp_path) / "imgs" / "0" / "sample_0.png").write_bytes(bomb)
    with little_memory(48), pytest.raises(ValueError, match=r"sample_0.png: a damaged PNG"):
        pathfinder.read(tmp_path)[0]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("\n" * (15 << 20), "more than 1,048,576 lines"),
        ("a/" * (1 << 20) + " sample_0.png 0 1", "row 1: a name of 2,097,152 characters, more than 255"),
        ("imgs/0 " + "s" * 300 + " 0 1", "row 1: a name of 300 characters"),
        ("imgs/0 sample_0.png 0 " + "1" * 5000, "the label must be 0 or 1, got '11111111111111111111'"),
        ("x " * (4 << 20), "row 1: the label must be"),
    ],
    ids=["newlines", "parts", "name", "label", "columns"],
)
def test_lines_of_metadata_are_bounded(tmp_path: Path, line: str, words: str) -> None:
    (level_folder(tmp_path) / "metadata" / "0.npy").write_text(line)
    with little_memory(128), pytest.raises(ValueError, match=words):
        pathfinder.read(tmp_path)


@pytest.mark.parametrize(
    "text",
    ["a." * 40_000 + "a = 1", "[" + "a . " * 20_000 + "a]\nb = 1", '"a".' * 17 + "a = 1"],
    ids=["key", "table", "quoted"],
)
def test_presets_whose_keys_take_quadratic_time_are_refused_at_once(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.toml").write_text(text)
    started = time.perf_counter()
    with pytest.raises(ValueError, match="a key of more than 16 parts"):
        load_preset(tmp_path / "a.toml")
    assert time.perf_counter() - started < 2


def test_presets_are_small(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("x" * (1 << 20) + "= 1")
    with pytest.raises(ValueError, match="at most 1,048,576 are read"):
        load_preset(tmp_path / "a.toml")
    (tmp_path / "a.toml").write_text("x" * ((1 << 20) - 3) + "= 1")
    started = time.perf_counter()
    with pytest.raises(ValueError, match="is not a preset"):
        load_preset(tmp_path / "a.toml")
    assert time.perf_counter() - started < 2
