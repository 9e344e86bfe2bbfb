"""Objects that torch.compile treats as constants of a graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

Self = TypeVar("Self", bound="Constant")
Rest = ParamSpec("Rest")
Result = TypeVar("Result")


class Constant:
    """Base of frozen dataclasses that torch.compile does not trace into: a graph holds results computed from them."""

    def evaluated(
        self: Self, function: Callable[Concatenate[Self, Rest], Result], *rest: Rest.args, **named: Rest.kwargs
    ) -> Result:
        """``function(self, *rest)``, called once while a graph is traced; the result is a constant of the graph.

        Must be a method: torch 2.11 rejects the object as an argument of a function that is assumed to be constant.

        Raises:
            TypeError: the object was made by the code that is being compiled, so torch knows only its class.
        """
        for name in getattr(self, "__dataclass_fields__", ()):
            if not hasattr(self, name):
                raise TypeError(
                    f"a {type(self).__name__} was made inside of a compiled function, where torch.compile does not "
                    "know its fields: make patterns and masks outside, and pass them in or refer to them"
                )
        return function(self, *rest, **named)

    # Set by torch.compiler.assume_constant_result, which would import the compiler, and triton, for everyone.
    evaluated._dynamo_marked_constant = True  # type: ignore[attr-defined]


def constant(
    of: Self, function: Callable[Concatenate[Self, Rest], Result], *rest: Rest.args, **named: Rest.kwargs
) -> Result:
    """``function(of, *rest)``, a constant in a graph of torch.compile. Each object gets its own graph."""
    id(of)  # makes torch.compile guard the graph with it
    return of.evaluated(function, *rest, **named)
