"""What the derivatives of the registered ops have in common, whatever they save and read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def needs_grad(inputs: Sequence[Tensor | None]) -> bool:
    return torch.is_grad_enabled() and True in [t is not None and t.requires_grad for t in inputs]


def c_apply(function: Any) -> Callable[..., tuple[Any, ...]]:
    """function.apply without what it does in Python, which serves functorch: under its transforms the reference runs,
    and no call comes here."""
    apply: Callable[..., tuple[Any, ...]] = super(torch.autograd.Function, function).apply
    return apply


def derive(library: torch.library.Library, op: str, inputs: int, outputs: int, apply: Callable[..., Any]) -> None:
    """Makes apply(run, *args) the derivative of a registered op; run is the op below autograd.

    inputs: how many of the first arguments can have a gradient. outputs: how many of apply's results are the op's.
    """
    registered = getattr(torch.ops.recattn_kernels, op).default

    def below_autograd(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*args)

    def autograd(*args: Any) -> Any:
        if not needs_grad(args[:inputs]):
            return below_autograd(*args)
        results = apply(below_autograd, *args)
        return results[0] if outputs == 1 else results[:outputs]

    # At the op's Autograd key rather than around it: torch.compile and export then see one op with a derivative.
    library.impl(op, autograd, "Autograd")


def recompute(
    definition: Callable[..., Sequence[Tensor | None]],
    inputs: Sequence[Tensor | None],
    grads: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients of the inputs as those of definition(*inputs), which can be differentiated again."""
    # Views, so that a tensor given for two arguments has a gradient for each.
    views = [None if t is None else t.view_as(t) for t in inputs]
    pairs = zip(definition(*views), grads, strict=True)
    used = [(o, g) for o, g in pairs if o is not None and g is not None and o.requires_grad]
    wanted = [v for v, need in zip(views, needs, strict=True) if v is not None and need]
    # An input that no used output depends on has a gradient of zeros, as from a backend: torch has no graph to find it.
    found: Sequence[Tensor] = [torch.zeros_like(v, requires_grad=True) for v in wanted]
    if used:
        outputs, flow = zip(*used, strict=True)
        found = torch.autograd.grad(outputs, wanted, flow, create_graph=True, materialize_grads=True)
    each = iter(found)
    return [next(each) if need else None for need in needs]
