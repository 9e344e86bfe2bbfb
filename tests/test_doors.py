"""What attention and decoding take as a mask and as operands, and the line they answer with where they take it not."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import sparseflash as sf
from sparseflash import patterns as P


def qkv(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(*shape, generator=generator).to(dtype) for _ in range(3))
    return q, k, v


@pytest.mark.parametrize("compiled", [False, True])
def test_text_is_a_mask_wherever_a_pattern_is(compiled: bool) -> None:
    q, k, v = qkv(1, 2, 100, 16)

    def call(x: Tensor) -> Tensor:
        out: Tensor = sf.attention(x, k, v, "causal() & local(20)")
        return out

    run = torch.compile(call, fullgraph=True, backend="eager") if compiled else call
    assert torch.equal(run(q), sf.attention(q, k, v, P.causal() & P.local(20)))

    def step(x: Tensor, lengths: Tensor) -> Tensor:
        out: Tensor = sf.decode(x, k, v, "causal() & local(20)", lengths=lengths)
        return out

    run_step = torch.compile(step, fullgraph=True, backend="eager") if compiled else step
    new = run_step(q[:, :, -1:], torch.tensor([100]))
    assert torch.equal(new, sf.decode(q[:, :, -1:], k, v, P.causal() & P.local(20), lengths=100))
    cache = sf.KVCache(1, 2, 100, 16)
    cache.append(k, v)
    assert torch.equal(cache.attend(q[:, :, -1:], "causal() & local(20)"), new)
    with pytest.raises(ValueError, match="no pattern is called 'lokal'"):
        sf.attention(q, k, v, "lokal(3)")


def predicate(b: Any, h: Any, q: Any, k: Any) -> Any:
    return q >= k


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (torch.ones(64, 64).bool(), r"Tensor of torch.bool, shape \(64, 64\); .*BlockMask.from_dense\(mask.cpu"),
        (
            torch.zeros(64, 64),
            r"Tensor of torch.float32, shape \(64, 64\); a bias is not a mask: .*bias=mask\[None, None\]",
        ),
        (torch.zeros(1, 1, 64, 64), r"a bias is not a mask: sparseflash.attention\(..., bias=mask\) adds one"),
        (torch.ones(64, 64).int(), r"if it is 0 where a query does not see a key .*from_dense\(\(mask != 0\).cpu"),
        (np.ones((64, 64), bool), r"ndarray of bool, shape \(64, 64\); .*BlockMask.from_dense"),
        (predicate, r"create_block_mask\(mask_mod, B, H, q_len, kv_len\)"),
        (lambda q, k: q >= k, r"where\(fn\)"),
        (P.causal, r"causal is not called: write causal\(\)"),
        (P.local, r"write local\(window\)"),
        (True, "True is not a pattern"),
        (5, "must be a Pattern, its text, a BlockMask, a LookupTable or None, got 5$"),
    ],
    ids=[
        *("bool tensor", "float tensor", "bias", "int tensor", "array"),
        *("mask_mod", "lambda", "causal", "local", "bool", "int"),
    ],
)
def test_what_is_no_mask_is_refused_with_the_line_to_write(mask: Any, words: str) -> None:
    q, k, v = qkv(1, 1, 64, 16)
    with pytest.raises(TypeError, match=words) as caught:
        sf.attention(q, k, v, mask)
    assert len(str(caught.value)) < 400
    with pytest.raises(TypeError, match=words):
        sf.decode(q[:, :, -1:], k, v, mask, lengths=64)


def test_an_empty_batch_gives_empty_results_and_gradients() -> None:
    q, k, v = torch.randn(0, 4, 64, 16), torch.randn(0, 2, 50, 16), torch.randn(0, 2, 50, 8)
    for x in (q, k, v):
        x.requires_grad_()
    assert sf.attention(q, k, v, P.local(9)).shape == (0, 4, 64, 8)
    out, lse = sf.attention(q, k, v, P.local(9), return_lse=True)
    assert (out.shape, lse.shape, lse.dtype) == ((0, 4, 64, 8), (0, 4, 64), torch.float32)
    gradients = torch.autograd.grad(out.sum(), (q, k, v))
    assert [g.shape for g in gradients] == [q.shape, k.shape, v.shape]
    sinks = torch.randn(4, requires_grad=True)
    with_sinks = sf.attention(q, k, v, sinks=sinks)
    assert torch.equal(torch.autograd.grad(with_sinks.sum(), sinks)[0], torch.zeros(4))
    with torch.no_grad(), pytest.raises(ValueError, match="whole sequence"):
        sf.decode(q[:, :, :1], k, v, P.local(9).compile(49), lengths=torch.zeros(0, dtype=torch.int32))
    with torch.no_grad():
        assert sf.decode(q[:, :, :1], k, v, lengths=torch.zeros(0, dtype=torch.int32)).shape == (0, 4, 1, 8)
    with pytest.raises(ValueError, match="no dimension but the batch may be 0"):
        sf.attention(q[:, :, :0], k, v)


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.bfloat16, torch.float32, torch.float32)])
def test_autocast_decides_the_dtype_as_for_sdpa(dtypes: tuple[torch.dtype, ...]) -> None:
    q, k, v = (x.to(dtype) for x, dtype in zip(qkv(1, 2, 64, 16), dtypes, strict=True))
    with torch.autocast("cpu", torch.bfloat16):
        out, theirs = sf.attention(q, k, v), F.scaled_dot_product_attention(q, k, v)
        assert out.dtype == theirs.dtype == torch.bfloat16
        new = sf.decode(q[:, :, -1:], k, v, lengths=64)
        assert new.dtype == torch.bfloat16
    assert torch.equal(out, sf.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))
    q, k, v = q.double(), k.double(), v.double()
    with torch.autocast("cpu", torch.bfloat16):
        assert sf.attention(q, k, v).dtype == F.scaled_dot_product_attention(q, k, v).dtype == torch.float64


def test_gradients_under_autocast_have_the_dtype_of_the_leaves() -> None:
    leaves = [x.requires_grad_() for x in qkv(1, 1, 32, 16)]
    with torch.autocast("cpu", torch.bfloat16):
        out = sf.attention(leaves[0], leaves[1], leaves[2], P.causal())
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert gradient.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
def test_nested_tensors_are_refused_in_words(layout: torch.layout) -> None:
    parts = [torch.randn(5, 2, 8), torch.randn(9, 2, 8)]
    q = torch.nested.nested_tensor(parts, layout=layout).transpose(1, 2)
    with pytest.raises(ValueError, match=r"q is a nested tensor: pack .* patterns.documents\(lengths\)"):
        sf.attention(q, q, q)


def test_sparse_operands_are_refused_in_words() -> None:
    q, k, v = qkv(1, 1, 32, 16)
    with pytest.raises(ValueError, match=r"k must be a dense tensor, got layout torch.sparse_coo; k.to_dense\(\)"):
        sf.attention(q, k.to_sparse(), v)


DTENSOR = """
import torch, torch.distributed as dist, sparseflash as sf
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
q = distribute_tensor(torch.randn(2, 2, 32, 16), init_device_mesh("cpu", (1,)), [Shard(1)])
try:
    sf.attention(q, q, q)
except ValueError as error:
    print(error)
dist.destroy_process_group()
"""


def test_dtensors_are_refused_with_the_way_out() -> None:
    done = subprocess.run([sys.executable, "-c", DTENSOR], capture_output=True, text=True, timeout=200, check=True)
    assert "q is a DTensor: where heads or samples are sharded" in done.stdout
    assert "q.to_local()" in done.stdout


SHARED = """
import torch, torch.distributed as dist, sparseflash as sf
from sparseflash.distributed import context_parallel_attention
from torch.distributed.device_mesh import init_device_mesh
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh, mask, x = init_device_mesh("cpu", (1,)), sf.parse("causal() & local(50)").compile(200), torch.randn(1, 2, 200, 16)
shared = torch.compile(lambda x: context_parallel_attention(2 * x, x, x, mask, mesh) + 1, backend="eager")
assert torch.allclose(shared(x), sf.attention(2 * x, x, x, mask) + 1, atol=1e-5)
dist.destroy_process_group()
"""


def test_attention_over_several_ranks_runs_outside_of_compiled_graphs() -> None:
    subprocess.run([sys.executable, "-c", SHARED], capture_output=True, timeout=200, check=True)


def test_a_scale_that_is_a_tensor_goes_into_the_queries() -> None:
    q, k, v = qkv(1, 1, 32, 16)
    scale = torch.tensor(0.3, requires_grad=True)
    with pytest.raises(TypeError, match=r"a learned one goes into q: q \* scale, scale=1.0"):
        sf.attention(q, k, v, scale=scale)  # type: ignore[call-overload]
    assert torch.allclose(sf.attention(q * scale, k, v, scale=1.0), sf.attention(q, k, v, scale=0.3), atol=1e-6)


def test_dir_shows_the_public_names() -> None:
    assert set(sf.__all__) <= set(dir(sf))
    program = "import sys, sparseflash; assert 'torch' not in sys.modules; print(' '.join(dir(sparseflash)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=os.environ, check=True)
    assert set(sf.__all__) <= set(done.stdout.split())


@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("samples", [1, 2])
@pytest.mark.parametrize("causal", [False, True])
def test_routed_tables_of_shared_heads_are_healthy(heads: int, samples: int, causal: bool) -> None:
    q, k = torch.randn(samples, 4, 60, 16), torch.randn(samples, heads, 60, 16)
    sf.routing.topk_table(q, k, 2, block=16, causal=causal).check()
    chosen = torch.randint(0, 4, (samples, heads, 4, 3))
    sf.LookupTable.from_indices(chosen, shape=60, block=16, q_heads=4, causal=causal).check()


def filled_cache() -> sf.KVCache:
    cache = sf.KVCache(2, 1, 8, 4)
    cache.append(torch.full((2, 1, 5, 4), 9.0), torch.full((2, 1, 5, 4), 9.0))
    return cache


@pytest.mark.parametrize("counts", [[4, 0], [-4, 1], [0, 3]])
def test_counts_outside_of_what_is_appended_are_refused(counts: list[int]) -> None:
    cache, new = filled_cache(), torch.ones(2, 1, 2, 4)
    before = cache.lengths.clone()
    with pytest.raises(ValueError, match=r"counts of sample [01] must be 0 to 2, got"):
        cache.append(new, new, counts=torch.tensor(counts))
    assert torch.equal(cache.lengths, before)


@pytest.mark.parametrize("tokens", [6, [6, 0], [0, -300]])
def test_rewinds_beyond_what_there_is_are_refused(tokens: int | list[int]) -> None:
    cache = filled_cache()
    with pytest.raises(ValueError, match=r"tokens of sample [01] must be 0 to 5, got"):
        cache.rewind(tokens if isinstance(tokens, int) else torch.tensor(tokens))
    assert cache.lengths.tolist() == [5, 5]
    cache.rewind(torch.tensor([5, 1]))
    assert cache.lengths.tolist() == [0, 4]


@pytest.mark.parametrize("made_in_inference", [False, True])
def test_caches_pass_in_and_out_of_inference_mode(made_in_inference: bool) -> None:
    new = torch.randn(1, 1, 2, 4)
    with torch.inference_mode(made_in_inference):
        cache = sf.KVCache(1, 1, 8, 4)
        cache.append(new, new)
    with torch.inference_mode(not made_in_inference):
        cache.append(new, new)
    cache.rewind(1)
    with torch.no_grad():
        out = cache.attend(new[:, :, :1])
    assert torch.isfinite(out).all()
    assert cache.lengths.tolist() == [3]
