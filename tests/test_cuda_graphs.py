"""Attention inside CUDA graphs: captured once, replayed on new operands, with tables that stay."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch

import sparseflash as sf
from sparseflash import patterns as P
from sparseflash.tables import device
from sparseflash.tables import from_indices as dynamic
from sparseflash.tables import lookup as tables

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@needs_gpu
def test_a_captured_call_replays_on_new_operands() -> None:
    q, k, v = torch.randn(3, 2, 4, 700, 64, device="cuda", dtype=torch.float16).unbind(0)
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    mask = P.causal() & (P.local(100) | P.global_tokens(3))
    seed = torch.tensor(5, device="cuda")

    def step() -> tuple[torch.Tensor, ...]:
        out = sf.attention(q, k, v, mask, dropout_p=0.2, seed=seed)
        return out, *torch.autograd.grad(out.square().sum(), (q, k, v))

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(2):  # kernels are compiled, tables copied
            step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    tables.cached_lookup.cache_clear()
    with torch.no_grad():
        for x in (q, k, v):
            x.copy_(torch.randn_like(x))
    seed.fill_(6)
    graph.replay()
    for got, expected in zip(captured, step(), strict=True):
        assert torch.equal(got, expected)


@needs_gpu
def test_what_cannot_be_captured_says_so() -> None:
    q = torch.randn(1, 2, 333, 64, device="cuda", dtype=torch.float16)
    with pytest.raises(RuntimeError, match="not on the device yet"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        sf.attention(q, q, q, P.local(17))


@contextmanager
def captured_calls() -> Iterator[None]:
    """Calls are as if they were being recorded."""
    with patch.object(tables, "capturing", return_value=True), patch.object(device, "capturing", return_value=True):
        yield


def test_no_table_is_copied_during_a_capture() -> None:
    dynamic._edges_of.cache_clear()  # any test may have drawn this one
    mask = P.local(3).compile(79, block=16)
    with captured_calls(), patch.object(tables, "_captured", set()):
        with pytest.raises(RuntimeError, match="not on the device yet"):
            sf.lookup(mask)
        with pytest.raises(RuntimeError, match="not on the device yet"):
            sf.LookupTable.from_indices(torch.zeros(1, 1, 5, 1, dtype=torch.int64), shape=79, block=16)
    assert sf.lookup(mask).shape == (79, 79)


def test_a_captured_table_outlives_the_cache() -> None:
    def kept(mask: sf.BlockMask) -> weakref.ref[sf.LookupTable]:
        return weakref.ref(sf.lookup(mask))

    with patch.object(tables, "_captured", set()):
        mask = P.local(3).compile(77, block=16)
        plain = kept(mask)
        assert not tables._captured
        with captured_calls():
            captured = kept(mask)
        tables.cached_lookup.cache_clear()
        gc.collect()
        assert captured() is plain() is not None
    tables.cached_lookup.cache_clear()
    gc.collect()
    assert captured() is None


def test_no_table_is_copied_while_capturing() -> None:
    dynamic._edges_of.cache_clear()
    mask = P.local(3).compile(78, block=16)
    with captured_calls(), pytest.raises(RuntimeError, match="run the call once"):
        sf.lookup(mask)
    with captured_calls(), pytest.raises(RuntimeError, match="run the call once"):
        sf.LookupTable.from_indices(torch.zeros(1, 1, 5, 1, dtype=torch.int32), shape=79, block=16)
