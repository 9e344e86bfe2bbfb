"""What attention keeps and needs: caches bounded in bytes, no growth with changing masks, memory linear in length."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.patterns import cache_budget
from sparseflash.patterns.compile_cache import compile_pattern
from sparseflash.patterns.compiling import compile_with_advice
from sparseflash.patterns.set_operations import full_mask
from sparseflash.tables.lookup import cached_lookup
from sparseflash.tools.bench import peak_mb

pytestmark = pytest.mark.tier2

ROOT = Path(__file__).parent.parent
CALLS = int(os.environ.get("SPARSEFLASH_SOAK_CALLS", "300"))


@pytest.fixture
def forgotten() -> Iterator[None]:
    for cache in (compile_pattern, compile_with_advice, full_mask, cached_lookup):
        cache.cache_clear()
    yield
    for cache in (compile_pattern, compile_with_advice, full_mask, cached_lookup):
        cache.cache_clear()


def qkv(tokens: int, heads: int = 2, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v = torch.randn(3, 1, heads, tokens, dim, generator=torch.Generator().manual_seed(seed)).unbind(0)
    return q, k, v


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def tables_alive() -> int:
    return sum(type(found) is sf.LookupTable for found in gc.get_objects())


def test_changing_masks_and_lengths_leave_nothing_behind(forgotten: None) -> None:
    """300 calls here; SPARSEFLASH_SOAK_CALLS=10000 for more."""

    def call(number: int) -> None:
        tokens = 40 + number % 50
        q, k, v = (x.requires_grad_() for x in qkv(tokens))
        pattern = P.causal() & (P.local(number) | P.random_blocks(1, unit=16, seed=number))
        mask: P.Pattern | P.BlockMask | sf.LookupTable = pattern
        if number % 3 == 1:
            mask = pattern.compile(tokens, block=16)
        elif number % 3 == 2:
            chosen = torch.randint(-(-tokens // 16), (1, 2, -(-tokens // 16), 2))
            mask = sf.LookupTable.from_indices(chosen, shape=tokens, block=16)
        sf.attention(q, k, v, mask).sum().backward()

    warm = CALLS // 2
    for number in range(warm):
        call(number)
    gc.collect()
    before, tables = resident_mb(), tables_alive()
    for number in range(warm, CALLS):
        call(number)
    gc.collect()
    grown = resident_mb() - before
    assert grown < 8, f"{grown:.1f} MB in {CALLS - warm} calls"
    assert tables_alive() <= tables + 8, "the cache was full before"


@pytest.mark.parametrize("most", [1 << 16, 1 << 19])
def test_caches_hold_no_more_bytes_than_they_may(forgotten: None, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    monkeypatch.setattr(cache_budget.MASKS, "most", most)
    monkeypatch.setattr(cache_budget.TABLES, "most", most)
    living: dict[str, list[tuple[weakref.ref[object], int]]] = {"masks": [], "tables": []}
    for number in range(60):
        mask = P.documents([100 + number] * 40).compile((100 + number) * 40, block=16)
        table = sf.lookup(mask)
        living["masks"].append((weakref.ref(mask), mask.nbytes))
        living["tables"].append((weakref.ref(table), table.nbytes))
        for made in living.values():
            # The newest of all stays whatever its size, and the loop itself still holds it.
            held = sum(size for reference, size in made[:-1] if reference() is not None)
            assert held <= most
    assert sum(reference() is not None for reference, _ in living["tables"]) < 60
    assert sf.lookup(mask) is table, "what is used goes on being found"


def test_threads_share_the_caches(forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    patterns = [P.causal() & P.local(3 * number) for number in range(12)]

    def grads(number: int) -> list[torch.Tensor]:
        q, k, v = (x.requires_grad_() for x in qkv(90 + number % 3, seed=number))
        out = sf.attention(q, k, v, patterns[number % 12])
        return [out.detach(), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    alone = [grads(number) for number in range(48)]
    monkeypatch.setattr(cache_budget.MASKS, "most", 5000)  # so that one thread forgets while another looks
    monkeypatch.setattr(cache_budget.TABLES, "most", 20_000)
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(grads, list(range(48)) * 3))
    for found, expected in zip(together, alone * 3, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


LOADER = """
import sys
import torch
from torch.utils.data import DataLoader, Dataset
import sparseflash as sf
from sparseflash import pathfinder

class Attended(Dataset):
    def __init__(self, folder):
        self.images = pathfinder.read(folder)
    def __len__(self):
        return len(self.images)
    def __getitem__(self, index):
        image, label = self.images[index]
        x = torch.from_numpy(pathfinder.to_floats(image)).reshape(1, 1, 64, 16)
        out = sf.attention(x, x, x, sf.parse(f"causal() & local({index % 3 + 4})"))
        return out + label

if __name__ == "__main__":
    data = Attended(sys.argv[1])
    here = torch.stack([data[index] for index in range(len(data))])
    for method, workers in (("fork", 2), ("spawn", 1)):
        loader = DataLoader(data, batch_size=2, num_workers=workers, multiprocessing_context=method)
        assert torch.equal(torch.cat(list(loader)), here), method
    print("equal")
"""


def test_data_loaders_that_fork_and_spawn(tmp_path: Path) -> None:
    sf.pathfinder.write(tmp_path / "data", 32, 6, progress=False)
    (tmp_path / "loader.py").write_text(LOADER)
    command = [sys.executable, str(tmp_path / "loader.py"), str(tmp_path / "data")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.stdout == "equal\n", done.stdout + done.stderr


@pytest.mark.parametrize("expression", ["causal() & local(256)", "local(128) | butterfly(unit=128)", "full()"])
def test_peak_memory_is_linear_in_the_length(expression: str) -> None:
    """The exponent of a power law through three lengths; a matrix of scores would make it 2."""
    lengths = (2048, 4096, 8192) if expression == "full()" else (4096, 8192, 16384)
    peaks = []
    for tokens in lengths:
        q, k, v = (x.requires_grad_() for x in qkv(tokens, heads=4, dim=32))
        table = sf.lookup(sf.parse(expression).compile(tokens))
        sf.attention(q[:, :, :256], k, v).sum().backward()  # what the first call of all allocates
        with peak_mb("cpu") as peak:
            torch.autograd.grad(sf.attention(q, k, v, table).sum(), (q, k, v))
        grown = peak()
        if grown is None:
            pytest.skip("this kernel does not tell a process's peak memory")
        peaks.append(grown)
    exponent = math.log(peaks[-1] / peaks[0]) / math.log(lengths[-1] / lengths[0])
    assert exponent < 1.25, f"{peaks} MB at {lengths} tokens"
