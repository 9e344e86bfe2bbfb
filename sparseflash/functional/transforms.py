"""Registration of operators, and their behaviour under the transforms of torch, equal for every operator.

- Reverse mode (``backward``, ``torch.func.grad``, ``vjp``, ``jacrev``): the operator's own first derivative, if it has
  one. Other derivatives, including second ones, are refused.
- Forward mode (``torch.func.jvp``, ``jacfwd``, ``linearize``, ``hessian``, dual tensors): refused.
- ``torch.func.vmap``: one call per slice.

docs/transforms.md describes this for users; tests/test_transforms.py tests it for every operator of the namespace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

NAMESPACE = "sparseflash"
_FORWARD = (
    "forward-mode derivatives (jvp, jacfwd, linearize, hessian, dual tensors) of {} are not implemented: take reverse "
    "mode (torch.func.vjp, grad or jacrev), or sparseflash.reference.attention, which has both modes"
)

Save = Callable[[Any, Sequence[Any], Any], None]
Backward = Callable[..., tuple[Any, ...]]


def register(
    library: torch.library.Library,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    kernel: Callable[..., Any],
    tags: Sequence[torch.Tag] = (),
) -> None:
    """Define an operator of CPUs and GPUs.

    Args:
        library: a fragment of the namespace, which must live as long as the operator.
        schema: the operator's name, arguments and results.
        function: computes the results.
        fake: returns empty results of the right shapes and dtypes.
        kernel: the autograd kernel, from :func:`differentiable`, :func:`derived` or :func:`constant`.
        tags: as ``torch.library.define`` takes them.
    """
    library.define(schema, tags=tuple(tags))
    name = schema.partition("(")[0]
    for key in ("CPU", "CUDA"):
        library.impl(name, function, key)
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    torch.library.register_vmap(f"{NAMESPACE}::{name}", _slices_of(name), lib=library)
    library.impl(name, kernel, "Autograd")


def differentiable(name: str, count: int, save: Save, backward: Backward) -> Callable[..., Any]:
    """The kernel of an operator with a first derivative with respect to its leading arguments.

    The kernel of `torch.library.register_autograd` flattens and rebuilds the table's list at every call, which was half
    of the host time of a forward pass (benchmarks/ledger.md), and `torch.func.grad` refuses it.

    Args:
        name: name of the operator.
        count: number of leading arguments with a derivative, tensors or None. No other argument may require one.
        save: called with ctx, all arguments and the results; stores in ctx whatever backward needs.
        backward: called with ctx and a cotangent (or None) for each result; returns gradients of the leading arguments.
    """

    class Recorded(torch.autograd.Function):
        """The operator at one level of torch.func's transforms, or at none. The dispatcher walks the levels."""

        @classmethod
        def apply(cls, *arguments: Any) -> Any:
            # Function.apply would walk the levels again.
            return super(torch.autograd.Function, cls).apply(*arguments)  # type: ignore[misc]

        @staticmethod
        def forward(*arguments: Any) -> Any:
            if not torch._C._are_functorch_transforms_active():
                return _below_autograd(name, *arguments[:-1], *arguments[-1])
            # An autograd.Function turns gradients off inside; the levels below must record theirs.
            with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
                return _below_autograd(name, *arguments[:-1], *arguments[-1])

        @staticmethod
        def setup_context(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
            ctx.set_materialize_grads(False)
            save(ctx, (*inputs[:-1], *inputs[-1]), output)

        @staticmethod
        def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
            return *backward(ctx, *cotangents), None

    Recorded.__name__ = Recorded.__qualname__ = name.title().replace("_", "")

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        leading, rest = arguments[:count], arguments[count:]
        transformed = torch._C._are_functorch_transforms_active()
        if transformed:
            _refuse_gradients(name, rest)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in leading):
            if not transformed:
                return Recorded.apply(*leading, rest)
            with enable_single_level_autograd_function():
                return Recorded.apply(*leading, rest)
        return _below_autograd(name, *arguments)

    return kernel


def derived(name: str, count: int) -> Callable[..., Any]:
    """The kernel of an operator that computes a derivative and refuses to be differentiated itself."""

    def save(ctx: Any, inputs: Sequence[Any], output: Any) -> None:
        pass

    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        raise NotImplementedError(
            "sparseflash attention has no second derivative: its gradient cannot be differentiated; "
            "sparseflash.reference.attention has derivatives of every order"
        )

    return differentiable(name, count, save, backward)


def constant(name: str) -> Callable[..., Any]:
    """The kernel of an operator without derivatives, for inference."""

    def kernel(*arguments: Any) -> Any:
        if forward_ad._current_level >= 0:
            _refuse_tangents(name, arguments)
        _refuse_gradients(name, arguments)
        return _below_autograd(name, *arguments)

    return kernel


def _below_autograd(name: str, *arguments: Any) -> Any:
    """The operator below autograd: the dispatcher continues with a backend, a fake or a tracer."""
    with torch._C._AutoDispatchBelowAutograd():
        return getattr(torch.ops.sparseflash, name)(*arguments)


def refuse_all(what: str, *tensors: Any) -> None:
    """Raise NotImplementedError in torch.func or for tensors with a tangent. For functions of several operators."""
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(
            f"{what} takes no transform of torch.func (grad, vjp, jvp, vmap): take gradients by loss.backward() or "
            "torch.autograd.grad"
        )
    if forward_ad._current_level >= 0:
        _refuse_tangents(what, tensors)


def _refuse_tangents(what: str, arguments: Sequence[Any]) -> None:
    if not torch._C._is_fwd_grad_enabled():
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in _floats(arguments)):
        raise NotImplementedError(_FORWARD.format(what))


def _refuse_gradients(name: str, arguments: Sequence[Any]) -> None:
    """Refuse arguments without a derivative that require one. Only a kernel sees the requirements of an outer level."""
    if torch.is_grad_enabled() and any(x.requires_grad for x in _floats(arguments)):
        raise NotImplementedError(
            f"{name} has no derivative with respect to an argument that requires one: detach it, call it under "
            "torch.no_grad(), or train with sparseflash.attention"
        )


def _floats(arguments: Sequence[Any]) -> Iterator[torch.Tensor]:
    return (x for x in arguments if isinstance(x, torch.Tensor) and x.is_floating_point())


PLAIN_TYPES = torch.Tensor, torch.nn.Parameter


def plain(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing observes the call of an operator with these tensors.

    False if a compiler or torch.jit traces, torch.func transforms, a mode or a tensor's own class intercepts calls, a
    tensor may have a tangent, or a profiler runs.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_torch_function_mode_enabled()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    ):
        return False
    for x in tensors:
        # The dispatcher resolves negated views, and tensors that a transform of torch.func left behind.
        if x is not None and (type(x) not in PLAIN_TYPES or x.is_neg() or x._is_zerotensor() or _of_a_transform(x)):
            return False
    return True


_of_a_transform = torch._C._functorch.is_functorch_wrapped_tensor


def _slices_of(name: str) -> Callable[..., Any]:
    """The operator over a mapped dim: one call per slice. Any argument may be mapped, even a table."""

    def mapped(info: Any, in_dims: tuple[Any, ...], *arguments: Any) -> tuple[Any, int]:
        if not info.batch_size:
            raise ValueError(f"vmap of {name} over a dim of size 0 has no slice to compute")
        operator = getattr(torch.ops.sparseflash, name)
        leaves, tree = pytree.tree_flatten(arguments)
        dims = pytree.tree_leaves(in_dims)
        slices = [
            pytree.tree_unflatten(
                [x if dim is None else x.select(dim, i).contiguous() for x, dim in zip(leaves, dims, strict=True)], tree
            )
            for i in range(info.batch_size)
        ]
        results = [operator(*given) for given in slices]
        if isinstance(results[0], torch.Tensor):
            return torch.stack(results), 0
        return tuple(torch.stack(every) for every in zip(*results, strict=True)), 0

    return mapped
