"""FlexAttention programs run by changing one import, and give what torch's own gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as theirs

import sparseflash as sf
from sparseflash import flex as ours
from sparseflash import patterns as P
from sparseflash.flex import converting
from sparseflash.integrations.flex import from_flex
from sparseflash.patterns.advice import SlowScan
from tests.oracle import check, random_case

# Said by FlexAttention once a process when it is not compiled; its plain implementation is what we compare with.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
B, H, N = 2, 4, 300

DOCUMENT = torch.tensor([0] * 70 + [1] * 130 + [2] * 100)
OF_SAMPLE = torch.stack([DOCUMENT, DOCUMENT.flip(0)])
PREFIX = torch.tensor([40, 150])
WINDOW = torch.tensor([0, 10, 100, 300])
TABLE = torch.rand(H, 30, 30, generator=torch.Generator().manual_seed(0)) < 0.3


def causal(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q >= k


def sliding_window(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) & (q - k <= 77)


def documents(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return DOCUMENT[q] == DOCUMENT[k]


def documents_of_each_sample(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return OF_SAMPLE[b, q] == OF_SAMPLE[b, k]


def prefix(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q >= k) | (k < PREFIX[b])


def window_of_each_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return (q - k).abs() <= WINDOW[h]


def table_of_each_head(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return TABLE[h, q // 10, k // 10]


def everything_varies(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return ((q - k).abs() <= WINDOW[h]) & (OF_SAMPLE[b, q] == OF_SAMPLE[b, k])


def nothing(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return q < 0


# With the number of samples and heads over which the answer really differs.
PROGRAMS: dict[str, tuple[Callable[..., Tensor], tuple[int, int]]] = {
    f.__name__: (f, shape)
    for f, shape in (
        (causal, (1, 1)),
        (sliding_window, (1, 1)),
        (documents, (1, 1)),
        (documents_of_each_sample, (B, 1)),
        (prefix, (B, 1)),
        (window_of_each_head, (1, H)),
        (table_of_each_head, (1, H)),
        (everything_varies, (B, H)),
        (nothing, (1, 1)),
    )
}


def program(flex: Any, mask_mod: Callable[..., Tensor], q_len: int, groups: int, **more: Any) -> list[Tensor]:
    """What a user wrote, with torch's module or ours; gradients where they exist on a CPU."""
    case = random_case(0, B, H // groups, groups, q_len, N, 16, 16, torch.float64)
    mask_mod = flex.and_masks(mask_mod, flex.or_masks(flex.noop_mask, flex.noop_mask))
    block_mask = flex.create_block_mask(mask_mod, B, H, q_len, N, device="cpu", BLOCK_SIZE=64)
    out, aux = flex.flex_attention(
        case.q, case.k, case.v, block_mask=block_mask, scale=0.3, enable_gqa=groups > 1,
        return_aux=flex.AuxRequest(lse=True), **more,
    )  # fmt: skip
    return [out, aux.lse]


@pytest.mark.parametrize(("q_len", "groups"), [(N, 1), (130, 2)], ids=["square", "fewer queries, grouped"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_one_import_changed(name: str, q_len: int, groups: int) -> None:
    mask_mod, _ = PROGRAMS[name]
    (out, lse), (their_out, their_lse) = (program(flex, mask_mod, q_len, groups) for flex in (ours, theirs))
    torch.testing.assert_close(out, their_out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(lse.to(their_lse.dtype), their_lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", PROGRAMS)
def test_masks_hold_what_the_mask_mod_says_and_no_sample_or_head_twice(name: str) -> None:
    mask_mod, shape = PROGRAMS[name]
    mask = from_flex(ours.create_block_mask(mask_mod, B, H, N, 200, device="cpu", BLOCK_SIZE=64))
    dense = ours.create_mask(mask_mod, B, H, N, 200, device="cpu")
    assert mask.pattern_of.shape == shape
    found = torch.from_numpy(mask.to_dense()).reshape(*shape, N, 200)
    assert torch.equal(found.expand(B, H, N, 200), dense)
    # One for all, unless the mask_mod asks for more.
    sizes = [1 if size > 1 else None for size in shape]
    one = ours.create_block_mask(ours.and_masks(mask_mod), sizes[0], sizes[1], N, 200, device="cpu", BLOCK_SIZE=64)
    assert torch.equal(torch.from_numpy(from_flex(one).to_dense()), dense[0, 0])


def test_the_gradient_of_a_program_on_a_cpu() -> None:
    """Where FlexAttention has none."""
    case = random_case(1, B, 2, 2, N, N, 16, 16, torch.float32)
    block_mask = ours.create_block_mask(everything_varies, B, H, N, N, device="cpu")
    q, k, v = case.leaves()
    out, lse = ours.flex_attention(q, k, v, None, block_mask, case.scale, True, return_lse=True)
    torch.autograd.backward((out, lse), (case.dout, case.dlse))
    token_mask = ours.create_mask(everything_varies, B, H, N, N, device="cpu")
    check(case, token_mask, [out.detach(), lse.detach(), *(x.grad for x in (q, k, v) if x.grad is not None)])


def test_torchs_block_masks_and_patterns_are_taken_too() -> None:
    case = random_case(2, B, H, 1, N, N, 16, 16, torch.float64)
    torchs = theirs.create_block_mask(sliding_window, None, None, N, N, device="cpu")
    mine = ours.create_block_mask(sliding_window, None, None, N, N, device="cpu")
    outs = [
        ours.flex_attention(case.q, case.k, case.v, block_mask=mask)
        for mask in (torchs, torchs, mine, P.causal() & P.local(77))
    ]
    assert all(torch.equal(out, outs[0]) for out in outs)
    full = ours.flex_attention(case.q, case.k[:1], case.v[:1])
    key, value = (x[:1].expand(B, -1, -1, -1) for x in (case.k, case.v))
    torch.testing.assert_close(full, theirs.flex_attention(case.q, key, value))


def test_a_mask_is_what_the_mask_mod_said_when_it_was_made() -> None:
    document = DOCUMENT.clone()
    mask_mod = lambda b, h, q, k: document[q] == document[k]  # noqa: E731
    before = ours.create_block_mask(mask_mod, None, None, N, N, device="cpu")
    document[:100] = 5
    after = ours.create_block_mask(mask_mod, None, None, N, N, device="cpu")
    assert from_flex(before) == P.documents([70, 130, 100]).compile(N, q_offset=0)
    assert from_flex(after) == P.documents([100, 100, 100]).compile(N, q_offset=0)


@pytest.mark.parametrize(("mask_mod", "name"), [(documents_of_each_sample, "B"), (window_of_each_head, "H")])
def test_samples_and_heads_are_counted_where_the_mask_mod_looks_at_them(
    mask_mod: Callable[..., Tensor], name: str
) -> None:
    x = torch.rand(B, H, N, 16)
    with pytest.raises(ValueError, match=rf"reads {name.lower()}.*{name} is None.*{name}=<"):
        ours.create_block_mask(mask_mod, None, None, N, N, device="cpu")
    one = ours.create_block_mask(mask_mod, 1, 1, N, N, device="cpu")
    ours.flex_attention(x[:1, :1], x[:1, :1], x[:1, :1], block_mask=one)
    for run in (ours.flex_attention, torch.compile(ours.flex_attention, backend="eager")):
        with pytest.raises(ValueError, match=rf"created with {name}=1.*create_block_mask\(mask_mod, \.\.\., {name}="):
            run(x, x, x, block_mask=one)
    for_all = ours.create_block_mask(causal, 1, 1, N, N, device="cpu")
    assert torch.equal(
        ours.flex_attention(x, x, x, block_mask=for_all), ours.flex_attention(x, x, x, block_mask=P.causal())
    )


def test_torchs_masks_are_read_as_they_are_at_each_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured tensors, tables, the function and the batch may change; what did not change is converted once."""
    case = random_case(5, B, H, 1, N, N, 16, 16, torch.float64)
    document = OF_SAMPLE.clone()
    mask_mod = lambda b, h, q, k: (q >= k) & (document[b, q] == document[b, k])  # noqa: E731
    blocks = torch.arange(1, 6)[None, None].int(), torch.arange(5).expand(1, 1, 5, 5).int()
    mask = theirs.BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=64, mask_mod=mask_mod, seq_lengths=(N, N))
    convert = Mock(wraps=from_flex)
    monkeypatch.setattr(converting, "from_flex", convert)

    def check(converted: int, samples: int = B) -> None:
        x = (case.q[:samples], case.k[:samples], case.v[:samples])
        for _ in range(2):
            got = ours.flex_attention(*x, block_mask=mask)
        blocks = mask.kv_num_blocks[0, 0].repeat_interleave(64)  # torch's own reads them when compiled
        both = theirs.and_masks(mask.mask_mod, lambda b, h, q, k: k // 64 < blocks[q])
        want = theirs.create_block_mask(both, samples, H, N, N, device="cpu")
        torch.testing.assert_close(got, theirs.flex_attention(*x, block_mask=want), rtol=1e-10, atol=1e-10)
        assert convert.call_count == converted

    check(1)
    document.data[1] = 0  # no version counts this
    check(2)
    check(3, samples=1)
    mask.kv_num_blocks.sub_((mask.kv_num_blocks > 1).int())
    check(4)
    mask.mask_mod = ours.and_masks(mask_mod, lambda b, h, q, k: k % 3 != h)
    check(5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_queries_are_counted_from_zero_also_for_biases() -> None:
    case = random_case(6, B, H, 1, 30, N, 16, 16, torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    x = case.q, case.k, case.v
    want = theirs.flex_attention(*x, lambda s, b, h, q, k: s - slopes[h] * (q - k).abs())
    all_pairs = theirs.create_block_mask(theirs.noop_mask, None, None, 30, N, device="cpu")
    for run in (ours.flex_attention, torch.compile(ours.flex_attention, backend="eager")):  # breaks its graph
        torch.testing.assert_close(run(*x, alibi_slopes=slopes), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(
        ours.flex_attention(*x, block_mask=all_pairs, alibi_slopes=slopes), want, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(sf.attention(*x, from_flex(all_pairs), alibi_slopes=slopes), want, rtol=1e-6, atol=1e-6)


def test_scores_that_torch_changes_by_code_are_arguments() -> None:
    case = random_case(3, B, H, 1, N, N, 16, 16, torch.float64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])
    block_mask = theirs.create_block_mask(causal, None, None, N, N, device="cpu")

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return 2 * torch.tanh(score / 2) - slopes[h] * (q - k).abs()

    want = theirs.flex_attention(case.q, case.k, case.v, score_mod, block_mask)
    got = ours.flex_attention(case.q, case.k, case.v, block_mask=block_mask, softcap=2.0, alibi_slopes=slopes)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    got = ours.flex_attention(case.q, case.k, case.v, score_mod, block_mask)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    for more in ({"softcap": 2.0}, {"alibi_slopes": slopes}):
        with pytest.raises(ValueError, match="leave out softcap= and alibi_slopes="):
            ours.flex_attention(case.q, case.k, case.v, score_mod, block_mask, **more)


def test_what_differs_is_refused() -> None:
    q = torch.rand(1, 4, 64, 16)
    with pytest.raises(ValueError, match="query has 4 heads, key 2: set enable_gqa=True"):
        ours.flex_attention(q, q[:, :2], q[:, :2])
    with pytest.raises(ValueError, match="return_lse and return_aux"):
        ours.flex_attention(q, q, q, return_lse=True, return_aux=ours.AuxRequest(lse=True))  # type: ignore[call-overload]
    with pytest.raises(NotImplementedError, match=r"largest scores.*the mask that it was built from"):
        ours.flex_attention(
            q, q, q, block_mask=sf.lookup(P.full().compile(64)), return_aux=ours.AuxRequest(False, True)
        )
    with pytest.raises(TypeError, match=r"mask_mod must return booleans, got torch\.int64"):
        ours.create_block_mask(lambda b, h, q, k: q - k, None, None, 64, 64, device="cpu")
    with pytest.raises(TypeError, match="mask_mod must be callable"):
        ours.create_block_mask("causal", None, None, 64, 64)  # type: ignore[arg-type]
    for size in (0, True, 2.0):
        with pytest.raises(ValueError, match="H must be an int of at least 1 or None"):
            ours.create_block_mask(causal, None, size, 64, 64, device="cpu")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="BLOCK_SIZE must be at least 1, got 0"):
        ours.create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=0)
    with pytest.raises(TypeError, match=r"BLOCK_SIZE must be an int or a pair of ints .* got 64\.0"):
        ours.create_block_mask(causal, None, None, 64, 64, device="cpu", BLOCK_SIZE=64.0)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"for a FlexAttention block mask, write .*from_flex\(block_mask\)"):
        sf.attention(q, q, q, ours.create_block_mask(causal, None, None, 64, 64, device="cpu"))  # type: ignore[call-overload]


def test_a_long_scan_names_the_structure_that_it_found() -> None:
    from sparseflash.patterns import advice

    tokens = 16 * int(advice.MANY_BLOCKS**0.5) + 16

    def dilated(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((q - k) % 3 == 0) & (q - k <= 77)

    with pytest.warns(SlowScan, match=r"dilated.*O\(N\^2\).*depends on q - k alone"):
        ours.create_block_mask(dilated, None, None, tokens, tokens, device="cpu", BLOCK_SIZE=16)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler
def test_a_compiled_program() -> None:
    case = random_case(4, B, H, 1, N, N, 16, 16, torch.float32)
    block_mask = ours.create_block_mask(sliding_window, None, None, N, N, device="cpu")
    compiled = torch.compile(ours.flex_attention, fullgraph=True, backend="aot_eager")
    out = compiled(case.q, case.k, case.v, block_mask=block_mask)
    torch.testing.assert_close(out, ours.flex_attention(case.q, case.k, case.v, block_mask=block_mask))


inside_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler


@inside_dynamo
def test_a_mask_is_made_inside_of_a_compiled_function() -> None:
    """Between two graphs, anew at each call: what its mask_mod reads may have changed."""

    def step(x: Tensor, lengths: Tensor) -> Tensor:
        block_mask = ours.create_block_mask(
            lambda b, h, q, k: (q >= k) & (k < lengths[b]), x.shape[0], None, 200, 200, device="cpu", BLOCK_SIZE=64
        )
        return ours.flex_attention(x, x, x, block_mask=block_mask) * 2

    torch._dynamo.reset()
    compiled, x = torch.compile(step, backend="eager"), torch.randn(2, 2, 200, 16)
    for lengths in (torch.tensor([200, 150]), torch.tensor([3, 77])):
        assert torch.equal(compiled(x, lengths), step(x, lengths))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match="call create_block_mask outside of the compiled function"):
        torch.compile(step, backend="eager", fullgraph=True)(x, lengths)


@inside_dynamo
def test_a_mask_of_torch_is_read_at_each_call_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    reach = torch.tensor(3)
    mask = theirs.create_block_mask(lambda b, h, q, k: (q - k).abs() <= reach, None, None, 64, 64, device="cpu")
    x = torch.randn(1, 1, 64, 16)
    compiled = torch.compile(lambda x, m: ours.flex_attention(x, x, x, block_mask=m), backend="eager")
    for reach_now in (3, 9):
        reach.fill_(reach_now)
        want = theirs.flex_attention(x, x, x, block_mask=mask)
        torch.testing.assert_close(compiled(x, mask), want, rtol=1e-5, atol=1e-5)
    whole = torch.compile(lambda x, m: ours.flex_attention(x, x, x, block_mask=m) + 1, backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match="from_flex outside of the compiled function"):
        whole(x, mask)


@inside_dynamo
def test_alibi_without_a_mask_counts_from_zero_in_compiled_functions_too() -> None:
    def call(q: Tensor, k: Tensor) -> Tensor:
        out = ours.flex_attention(q, k, k, alibi_slopes=torch.tensor([0.5, 2.0]))
        assert isinstance(out, Tensor)
        return out

    torch._dynamo.reset()
    q, k = torch.randn(1, 2, 5, 16), torch.randn(1, 2, 40, 16)
    assert torch.equal(torch.compile(call, backend="eager")(q, k), call(q, k))
    torch._dynamo.reset()
    with pytest.raises(RuntimeError, match=r"alibi_slopes without a block_mask.*create_block_mask\(noop_mask"):
        torch.compile(call, backend="eager", fullgraph=True)(q, k)
    same = torch.randn(1, 2, 40, 16)
    assert torch.equal(torch.compile(call, backend="eager", fullgraph=True)(same, k), call(same, k))


def test_a_misspelt_keyword_is_refused_and_torchs_own_are_not() -> None:
    mask = ours.create_block_mask(causal, None, None, 256, 256, device="cpu", separate_full_blocks=False)
    assert from_flex(mask) == P.causal().compile(256)
    with pytest.raises(TypeError, match=r"no argument BLOCKSIZE; did you mean BLOCK_SIZE\?"):
        ours.create_block_mask(causal, None, None, 256, 256, device="cpu", BLOCKSIZE=64)
    with pytest.raises(TypeError, match=r"no argument colour$"):
        ours.create_block_mask(causal, None, None, 256, 256, device="cpu", colour=64)
