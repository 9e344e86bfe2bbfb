"""What torch's transforms make of every operator is what docs/transforms.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import sparseflash as sf
from sparseflash import flex
from sparseflash import patterns as P
from sparseflash.functional.operators import MaskArguments
from sparseflash.integrations.transformers.masks import describe
from sparseflash.integrations.transformers.operators import model_attention
from sparseflash.kernels.layout import Score
from sparseflash.rotary import Rotary1d
from sparseflash.tables import lookup as lookup_tables
from tests.oracle import random_case
from tests.pages import ROOT

PAGE = ROOT / "docs" / "transforms.md"
PATTERN = P.causal() & P.local(9)
TOKENS = 20
inside_dynamo = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # raised inside torch's compiler


@dataclass(frozen=True)
class Example:
    """A call of an operator."""

    name: str
    tensors: tuple[Tensor, ...]  # the leading arguments
    rest: tuple[Any, ...]

    def __call__(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result: Tensor | tuple[Tensor, ...] = getattr(torch.ops.sparseflash, self.name)(*tensors, *self.rest)
        return (result,) if isinstance(result, Tensor) else result

    def first(self, x: Tensor) -> Tensor:
        """The first result as a function of the first argument."""
        return self(x, *self.tensors[1:])[0]


def causal_mask_function(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def examples() -> dict[str, Example]:
    case = random_case(0, 1, 1, 2, TOKENS, TOKENS, 8, 8, torch.float32)
    q, k, v = case.q, case.k, case.v
    sinks, slopes = torch.zeros(2), torch.ones(2)
    mask, score = MaskArguments.named(PATTERN, (16, 16)), Score(0.3, 2.0, slopes)[:-1]
    setting = *mask, "cpu", False, *score
    bias = torch.randn(1, 2, TOKENS, TOKENS, generator=torch.Generator().manual_seed(0))
    table = sf.lookup(PATTERN.compile(TOKENS, block=16, q_offset=0))
    told = describe(1, TOKENS, TOKENS, mask_function=causal_mask_function)
    model = told, "local(9)", 16, 0.3, None, 0.0, None
    out, lse = torch.ops.sparseflash.attention(q, k, v, sinks, bias, *setting)
    given = case.dout, case.dlse, q, k, v, out, lse, bias
    model_out, model_lse = torch.ops.sparseflash.model_attention(q, k, v, sinks, bias, *model)
    model_given = case.dout, q, k, v, model_out, model_lse, bias
    rows, tiles = ([x.clone() for x in part.tensors()] for part in (table.rows, table.tiles))
    decoding = torch.tensor([17]), rows, tiles, table.pattern_of.clone(), 16, 16, "cpu", 0.3, None, slopes
    made = (
        Example("attention", (q, k, v, sinks, bias), setting),
        Example("attention_backward", given, setting),
        Example("attention_bias_backward", given, (*mask, "cpu", *score)),
        Example("decode", (q[:, :, :3].contiguous(), k, v, sinks), decoding),
        Example("model_attention", (q, k, v, sinks, bias), model),
        Example("model_attention_backward", model_given, model),
        Example("model_attention_bias_backward", model_given, model),
    )
    return {example.name: example for example in made}


EXAMPLES = examples()


def eager_gradient(example: Example, x: Tensor) -> Tensor:
    leaf = x.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(example.first(leaf).square().sum(), leaf)
    return gradient


def backward(example: Example) -> None:
    x = example.tensors[0]
    want = eager_gradient(example, x)
    assert want.abs().max() > 0.01
    assert torch.equal(torch.func.grad(lambda x: example.first(x).square().sum())(x), want)
    found: Any = torch.func.vjp(example.first, x)
    assert torch.equal(found[1](2 * found[0])[0], want)


def refuses_backward(example: Example) -> None:
    """Also for an outer level, which only the operator sees."""
    x = example.tensors[0]

    def nested(x: Tensor) -> Any:
        return torch.func.grad(lambda y: example.first(x).sum() * y)(torch.ones(()))

    calls: list[Callable[[], object]] = [
        lambda: eager_gradient(example, x),
        lambda: torch.func.grad(lambda x: example.first(x).sum())(x),
        lambda: torch.func.grad(nested)(x),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"sparseflash\."):
            call()


def jacrev(example: Example) -> None:
    x = example.tensors[0][:, :, :3].contiguous() if example.name == "decode" else example.tensors[0]
    found = torch.func.jacrev(lambda x: example.first(x)[0, 0, :2])(x)
    leaf = x.detach().clone().requires_grad_()
    out = example.first(leaf)[0, 0, :2]
    for i, j in ((0, 0), (1, 3), (1, 7)):
        torch.testing.assert_close(found[i, j], torch.autograd.grad(out[i, j], leaf, retain_graph=True)[0])


def refuses_jacrev(example: Example) -> None:
    with pytest.raises(NotImplementedError, match=r"sparseflash\."):
        torch.func.jacrev(example.first)(example.tensors[0])


def refuses_second(example: Example) -> None:
    x = example.tensors[0]

    def gradient(x: Tensor) -> Any:
        return torch.func.grad(lambda x: example.first(x).square().sum())(x).sum()

    def eager() -> None:
        leaf = x.detach().clone().requires_grad_()
        (first,) = torch.autograd.grad(example.first(leaf).square().sum(), leaf, create_graph=True)
        first.sum().backward()

    calls: list[Callable[[], object]] = [
        eager,
        lambda: torch.func.grad(gradient)(x),
        lambda: torch.func.jacrev(torch.func.jacrev(lambda x: example.first(x).sum()))(x),
        lambda: torch.func.hessian(lambda x: example.first(x).sum())(x),
    ]
    for call in calls:
        with pytest.raises(NotImplementedError, match=r"sparseflash\."):
            call()


def refuses_forward_mode(example: Example) -> None:
    """Of any argument."""
    for i, x in enumerate(example.tensors):

        def at(x: Tensor, i: int = i) -> Tensor:
            return example(*example.tensors[:i], x, *example.tensors[i + 1 :])[0]

        for call in forward_modes(at, x):
            with pytest.raises(NotImplementedError, match=r"sparseflash\."):
                call()


def forward_modes(f: Callable[[Tensor], Tensor], x: Tensor) -> list[Callable[[], object]]:
    def dual(x: Tensor) -> None:
        with forward_ad.dual_level():
            f(forward_ad.make_dual(x, torch.ones_like(x)))

    return [
        lambda: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda: torch.func.jacfwd(f)(x),
        lambda: torch.func.linearize(f, x),
        lambda: torch.func.grad(lambda y: torch.func.jvp(f, (x,), (x,))[1].sum() * y)(torch.ones(())),
        lambda: torch.func.jvp(lambda y: torch.func.grad(lambda z: f(x * y).sum() * z)(y), *[(torch.ones(()),)] * 2),
        lambda: dual(x),
        lambda: dual(x.detach().clone().requires_grad_()),
    ]


def vmap(example: Example) -> None:
    """Of every argument alone, of all together, nested, and within a derivative."""
    mapped = [torch.stack([x, x.flip(-1), 2 * x]) for x in example.tensors]
    slices = zip(*(example(*(x[i] for x in mapped)) for i in range(3)), strict=True)
    for a, b in zip(torch.func.vmap(example)(*mapped), slices, strict=True):
        assert torch.equal(a, torch.stack(b))
    for i, x in enumerate(mapped):
        dims = tuple(1 if i == j else None for j in range(len(mapped)))
        found = torch.func.vmap(example, in_dims=dims)(*example.tensors[:i], x.movedim(0, 1), *example.tensors[i + 1 :])
        for at in range(3):
            want = example(*example.tensors[:i], x[at], *example.tensors[i + 1 :])
            assert all(torch.equal(a[at], b) for a, b in zip(found, want, strict=True))
    twice = torch.func.vmap(torch.func.vmap(example))(*(x.unsqueeze(0) for x in mapped))
    assert all(torch.equal(a[0], b) for a, b in zip(twice, torch.func.vmap(example)(*mapped), strict=True))
    with pytest.raises(ValueError, match="over a dim of size 0"):
        torch.func.vmap(example)(*(x[:0] for x in mapped))


def compiled(example: Example) -> None:
    torch._dynamo.reset()
    graph = torch.compile(example.__call__, backend="aot_eager", fullgraph=True)
    for a, b in zip(graph(*example.tensors), example(*example.tensors), strict=True):
        torch.testing.assert_close(a, b)


class Program(torch.nn.Module):
    """Operators as a module."""

    def __init__(self, *examples: Example) -> None:
        super().__init__()
        self.examples = examples

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        found: list[Tensor] = []
        at = 0
        for example in self.examples:
            found += example(*tensors[at : at + len(example.tensors)])
            at += len(example.tensors)
        return found


def exported(example: Example, tmp_path: Path) -> None:
    file = tmp_path / "program.pt2"
    torch.export.save(torch.export.export(Program(example), example.tensors), file)
    found = torch.export.load(file).module()(*example.tensors)
    assert all(torch.equal(a, b) for a, b in zip(found, example(*example.tensors), strict=True))


def fake(example: Example) -> None:
    want = example(*example.tensors)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        found = example(*map(mode.from_tensor, example.tensors))
    for a, b in zip(found, want, strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def together(example: Example) -> None:
    """`test_aotinductor` compiles all operators at once."""


CHECKS: dict[tuple[str, str], Callable[..., None]] = {
    ("backward, grad, vjp", "yes"): backward,
    ("backward, grad, vjp", "refused"): refuses_backward,
    ("jacrev", "yes"): jacrev,
    ("jacrev", "refused"): refuses_jacrev,
    ("second derivative", "refused"): refuses_second,
    ("jvp, dual tensors", "refused"): refuses_forward_mode,
    ("vmap", "yes"): vmap,
    ("compile", "yes"): compiled,
    ("export", "yes"): exported,
    ("AOTInductor", "yes"): together,
    ("fake tensors", "yes"): fake,
}


def promised() -> list[tuple[str, str, str]]:
    """The cells of the page's table: operator, transform, what it says."""
    head, _, *rows = ([cell.strip(" `") for cell in line.strip("|").split("|")] for line in _table())
    return [(row[0], column, cell) for row in rows for column, cell in zip(head[1:], row[1:], strict=True)]


def _table() -> list[str]:
    return [line for line in PAGE.read_text().splitlines() if line.startswith("|")]


@inside_dynamo
@pytest.mark.parametrize(("name", "transform", "says"), promised())
def test_a_transform_does_what_the_page_says(name: str, transform: str, says: str, tmp_path: Path) -> None:
    check = CHECKS[transform, says]
    check(EXAMPLES[name], tmp_path) if check is exported else check(EXAMPLES[name])


def test_the_page_has_a_row_for_every_operator() -> None:
    registered = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if name.startswith("sparseflash::")
    }
    assert {name for name, _, _ in promised()} == set(EXAMPLES) == registered
    assert {transform for _, transform, _ in promised()} == {transform for transform, _ in CHECKS}


def test_operators_are_registered_with_the_package() -> None:
    """A module that defines some is one that `import sparseflash` loads after torch."""
    defining = {
        ".".join(path.relative_to(ROOT / "sparseflash").with_suffix("").parts)
        for path in (ROOT / "sparseflash").rglob("*.py")
        if re.search(r"^_library = ", path.read_text(), re.M)
    }
    assert defining == set(sf._WITH_OPERATORS)


@inside_dynamo
@pytest.mark.parametrize(
    "imports", ["import torch, sparseflash", "import sparseflash, torch, sparseflash.functional.operators"]
)
def test_another_process_loads_a_program(imports: str, tmp_path: Path) -> None:
    q, file = torch.randn(1, 2, 40, 8), str(tmp_path / "program.pt2")
    out = sf.attention(q, q, q, PATTERN)
    setting = *MaskArguments.named(PATTERN, (128, 128)), "cpu", False, *Score(8**-0.5)[:-1]
    program = Program(Example("attention", (q, q, q), (None, None, *setting)))
    torch.export.save(torch.export.export(program, (q, q, q)), file)
    torch.save((q, out), tmp_path / "tensors.pt")
    code = f"""{imports}
q, out = torch.load({str(tmp_path / "tensors.pt")!r}, weights_only=True)
assert torch.equal(torch.export.load({file!r}).module()(q, q, q)[0], out)"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.tier2
@inside_dynamo
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch, used by torch
def test_aotinductor(tmp_path: Path) -> None:
    program = Program(*EXAMPLES.values())
    tensors = tuple(x for example in EXAMPLES.values() for x in example.tensors)
    package = torch._inductor.aoti_compile_and_package(
        torch.export.export(program, tensors), package_path=str(tmp_path / "package.pt2")
    )
    for a, b in zip(torch._inductor.aoti_load_package(package)(*tensors), program(*tensors), strict=True):
        torch.testing.assert_close(a, b)


@inside_dynamo
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("mask", [P.where(lambda q, k: k <= q), P.from_blocks([[True]], unit=64)], ids=str)
def test_a_pattern_without_text_is_refused_at_export(mask: P.Pattern, strict: bool) -> None:
    class Attend(torch.nn.Module):
        def __init__(self, mask: P.Pattern | sf.BlockMask) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, x: Tensor) -> Tensor:
            return sf.attention(x, x, x, self.mask)

    x = torch.randn(1, 1, 64, 16)
    with pytest.raises(ValueError, match=r"is not told by its text: export a compiled mask, pattern\.compile"):
        torch.export.export(Attend(mask), (x,), strict=strict)
    compiled = mask.compile(64)
    program = torch.export.export(Attend(compiled), (x,), strict=strict)
    assert torch.equal(program.module()(x), sf.attention(x, x, x, mask))


@inside_dynamo
@pytest.mark.parametrize("strict", [False, True])
def test_decoding_is_exported(strict: bool, tmp_path: Path) -> None:
    """With constants that AOTInductor tells apart: none is a part of another."""

    class Decode(torch.nn.Module):
        def __init__(self, mask: P.Pattern | sf.BlockMask | sf.LookupTable) -> None:
            super().__init__()
            self.mask = mask

        def forward(self, q: Tensor, k: Tensor, lengths: Tensor) -> Tensor:
            return sf.decode(q, k, k, self.mask, lengths=lengths)

    given = torch.randn(1, 2, 1, 16), torch.randn(1, 2, 64, 16), torch.tensor([40])
    pattern = P.streaming(2, 20)
    table = sf.lookup(pattern.compile(64, q_offset=0))
    for mask in (pattern, pattern.compile(64, q_offset=0)):
        program = torch.export.export(Decode(mask), given, strict=strict)
        for constant in program.constants.values():
            if isinstance(constant, Tensor):
                assert constant.untyped_storage().nbytes() == constant.nbytes
        torch.export.save(program, tmp_path / "program.pt2")
        loaded = torch.export.load(tmp_path / "program.pt2").module()
        assert torch.equal(loaded(*given), sf.decode(*given[:2], given[1], table, lengths=given[2]))
    with pytest.raises(Exception, match="takes a Pattern or a BlockMask, got the LookupTable of one"):
        torch.export.export(Decode(table), given, strict=strict)


@inside_dynamo
def test_an_exported_layer_serves_every_length() -> None:
    layer = sf.SparseTransformerBlock(sf.SparseAttention(32, 4, PATTERN))
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    program = torch.export.export(layer, (torch.randn(1, 50, 32),), dynamic_shapes=({1: tokens},)).module()
    for n in (50, 7, 300):
        x = torch.randn(1, n, 32)
        torch.testing.assert_close(program(x), layer(x))


def test_a_program_names_the_pattern_that_a_process_does_not_know() -> None:
    q, score = torch.zeros(1, 1, 16, 8), Score(1.0)[:-1]
    with pytest.raises(ValueError, match=r"asks for the pattern mine\(\), which this process does not know"):
        torch.ops.sparseflash.attention(q, q, q, None, None, None, [16, 16], "mine()", "cpu", False, *score)


@given(
    st.integers(0, 2**16),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([P.causal(), P.local(3), P.per_head(P.full(), P.local(1))]),
)
def test_gradients_by_sample_are_those_of_a_loop(seed: int, dim: int | None, mask: P.Pattern) -> None:
    case = random_case(seed, 2, 2, 1, 33, 40, 8, 16, torch.float64)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = sf.attention(q, k, v, mask, return_lse=True)
        return out.square().sum() + lse.cos().sum()

    gradient = torch.func.grad(loss, argnums=(0, 1, 2))
    keys = torch.stack([case.k, -case.k, case.k.flip(2)], dim or 0)
    found = torch.func.vmap(gradient, in_dims=(None, dim, None) if dim is not None else (None, 0, None))(
        case.q, keys, case.v
    )
    for i, k in enumerate(keys.unbind(dim or 0)):
        for a, b in zip(found, gradient(case.q, k, case.v), strict=True):
            assert torch.equal(a[i], b)


@pytest.mark.parametrize(
    "make", [lambda f, x: torch.func.grad(lambda x: f(x).sum())(x), lambda f, x: torch.func.vmap(f)(x[None])]
)
def test_what_a_transform_makes_first_serves_later_calls(make: Callable[..., object]) -> None:
    """Tables are cached; made within a transform, their tensors would belong to its level."""
    lookup_tables.cached_lookup.cache_clear()
    pattern = P.local(hash(make) % 50)
    layers = [
        sf.SparseAttention(16, 2, pattern, rotary=Rotary1d()),
        sf.SparseAttention(16, 2, pattern, alibi=True),
        sf.SparseAttention(16, 2, lambda q, k: sf.routing.topk_table(q, k, 2, block=16)),
    ]
    x = torch.randn(1, 70, 16)
    for layer in layers:
        make(layer, x)
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
        outer = torch.func.grad(lambda x, layer=layer: torch.func.grad(lambda y: (layer(x) * y).sum())(x).sum())(x)
        torch.testing.assert_close(outer, leaf.grad)
    q = torch.randn(1, 2, 1, 8)
    k = torch.randn(1, 2, 90, 8)
    torch.func.vmap(lambda q: sf.decode(q, k, k, pattern, lengths=80))(q[None])
    assert sf.decode(q, k, k, pattern, lengths=80).isfinite().all()


def test_a_tensor_that_a_transform_left_behind_is_read_as_its_values() -> None:
    q = torch.randn(1, 1, 40, 8)
    left = list[Tensor]()

    def leaving(x: Tensor) -> Tensor:
        left.append(x * 1)
        return x.sum()

    torch.func.grad(leaving)(q)
    want, leaf = sf.attention(q, q, q, PATTERN), q.clone().requires_grad_()
    with torch.no_grad():
        assert torch.equal(sf.attention(left[0], left[0], left[0], PATTERN), want)
    out = sf.attention(leaf, left[0], left[0], PATTERN)
    assert torch.equal(out, want)
    assert torch.autograd.grad(out.sum(), leaf)[0].isfinite().all()


def test_derivatives_of_outer_levels() -> None:
    """Eager autograd around torch.func, and what torch.no_grad says in between."""
    case = random_case(3, 1, 2, 1, 40, 40, 8, 8, torch.float32)
    x = case.q.clone().requires_grad_()
    want = torch.autograd.grad(sf.attention(x, case.k, case.v).sum(), x)[0]

    def outer(*, recorded: bool) -> Any:
        with torch.set_grad_enabled(recorded):
            return torch.func.grad(lambda y: (sf.attention(x, case.k, case.v) * y).sum())(torch.ones_like(case.v))

    assert torch.equal(torch.autograd.grad(outer(recorded=True).sum(), x)[0], want)
    assert not outer(recorded=False).requires_grad
    slopes = torch.zeros(2)
    with pytest.raises((ValueError, NotImplementedError), match="detach"):
        torch.func.grad(
            lambda s: torch.func.grad(lambda y: (sf.attention(case.q, case.k, case.v, alibi_slopes=s) * y).sum())(
                x
            ).sum()
        )(slopes)


def cached(x: Tensor) -> Tensor:
    cache = sf.KVCache(1, 2, 64, 8)
    cache.append(x, x)
    return cache.attend(x[:, :, -1:], P.causal())


@pytest.mark.parametrize(
    "function",
    [
        lambda x: sf.attention(x, x, x, PATTERN),
        lambda x: sf.attention(x, x, x, sf.routing.topk_table(x, x, 2, block=16)),
        lambda x: flex.flex_attention(x, x, x),
        lambda x: sf.SparseAttention(8, 2, PATTERN)(x[:, 0]),
        lambda x: sf.SparseTransformerBlock(sf.SparseAttention(8, 2, PATTERN))(x[:, 0]),
        lambda x: model_attention(
            *(x, x, x, describe(1, 40, 40, mask_function=causal_mask_function)), pattern="local(5)", block=16, scale=1.0
        ),
        lambda x: sf.decode(x[:, :, -1:], x, x, lengths=40),
        cached,
    ],
    ids=["attention", "routed", "flex", "layer", "block", "model", "decode", "cache"],
)
def test_forward_mode_is_refused_by_all_that_is_made_of_attention(function: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(1, 2, 40, 8)
    with pytest.raises(NotImplementedError, match=r"forward-mode derivatives .* sparseflash\.reference\.attention"):
        torch.func.jvp(function, (x,), (x,))
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        function(forward_ad.make_dual(x, x))
    function(x)


def test_the_reference_has_both_modes() -> None:
    q, k, v, tangent = torch.randn(4, 1, 2, 30, 8, dtype=torch.float64).unbind(0)
    allowed = torch.from_numpy(PATTERN.compile(30).to_dense())
    found = torch.func.jvp(lambda q: sf.reference.attention(q, k, v, allowed), (q,), (tangent,))[1]
    step = 1e-6
    ahead, behind = (sf.attention(q + sign * step * tangent, k, v, PATTERN) for sign in (1, -1))
    torch.testing.assert_close(found, (ahead - behind) / (2 * step), rtol=1e-6, atol=1e-8)


@inside_dynamo
def test_transforms_inside_of_a_compiled_function() -> None:
    torch._dynamo.reset()
    q, k, v = torch.randn(3, 1, 2, 30, 8).unbind(0)

    def attend(q: Tensor) -> Tensor:
        return sf.attention(q, k, v, PATTERN)

    def gradient(q: Tensor) -> Any:
        return torch.func.grad(lambda q: attend(q).square().sum())(q)

    for transformed, x in ((gradient, q), (torch.func.vmap(attend), torch.stack([q, -q]))):
        graph = torch.compile(transformed, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(graph(x), transformed(x))
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.compile(lambda q: torch.func.jvp(attend, (q,), (q,)), backend="aot_eager")(q)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.compile(attend, backend="aot_eager")(forward_ad.make_dual(q, q))
