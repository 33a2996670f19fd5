"""What lstm_step and gru_step share: registered ops that take a few tensors and give a few, and their derivative.

A backward computes from the inputs anew: they are all that is saved.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends

LIBRARY = torch.library.Library("recattn_kernels", "FRAGMENT")
Tensors = tuple[Tensor, ...]


class Call(NamedTuple):
    """One checked call: gates, whose dtype is that of the call, and the tensors beside them."""

    x: Tensor
    rest: Tensors


class Step:
    """The op `name` of the tensors `inputs`, registered with its backward.

    definition: the reference, which gives a tuple. outputs: the dtypes and shapes of its results, as empty tensors.
    """

    def __init__(
        self,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        definition: Callable[..., Tensors],
        empty: Callable[..., Tensors],
    ) -> None:
        self.name, self.count, self.definition, self.empty = name, len(inputs), definition, empty
        tensors = ", ".join(f"Tensor {i}" for i in inputs)
        flow = ", ".join(f"Tensor? grad_{o}" for o in outputs)
        results = [
            ", ".join(f"Tensor {prefix}{n}" for n in names) for prefix, names in (("", outputs), ("grad_", inputs))
        ]
        pt2 = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(f"{name}({tensors}, str backend) -> ({results[0]})", tags=pt2)
        LIBRARY.define(f"{name}_backward({flow}, {tensors}, str backend) -> ({results[1]})", tags=pt2)
        self.outputs = len(outputs)
        self.function = _function(self)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, lambda *args: _unwrapped(self.forward(*args)), key)
            LIBRARY.impl(f"{name}_backward", self.backward, key)
        LIBRARY.impl(name, self._autograd, "Autograd")
        register = torch.library.register_fake
        register(f"recattn_kernels::{name}", lambda *args: _unwrapped(empty(*args[:-1])), lib=LIBRARY)
        register(
            f"recattn_kernels::{name}_backward",
            lambda *args: tuple(t.new_empty(t.shape) for t in args[self.outputs : -1]),
            lib=LIBRARY,
        )

    def forward(self, *args: Any) -> Tensors:
        return tuple(backends.load(self.name, args[-1]).forward(*args[:-1]))

    def backward(self, *args: Any) -> Tensors:
        inputs = args[self.outputs : -1]
        return tuple(backends.load(self.name, args[-1]).backward(args[: self.outputs], *inputs))

    def _below_autograd(self, *args: Any) -> Tensors:
        with torch._C._AutoDispatchBelowAutograd():
            return _wrapped(getattr(torch.ops.recattn_kernels, self.name).default(*args))

    def _autograd(self, *args: Any) -> Any:
        if _needs_grad(args[:-1]):
            return _unwrapped(self.function(self._below_autograd, *args))
        return _unwrapped(self._below_autograd(*args))

    def run(self, table: backends.Table, backend: str | None, *inputs: Tensor) -> Tensors:
        """The results, on the backend that is asked for."""
        backend = backends.choose(self.name, backend, table, Call(inputs[0], inputs[1:]))
        if backend == "reference":
            return self.definition(*inputs)
        if backends.dispatches(*inputs):
            return _wrapped(getattr(torch.ops.recattn_kernels, self.name).default(*inputs, backend))
        if _needs_grad(inputs):
            return self.function(self.forward, *inputs, backend)
        return self.forward(*inputs, backend)


def _function(step: Step) -> Callable[..., Tensors]:
    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Tensors], *args: Any) -> Tensors:
            ctx.save_for_backward(*args[:-1])
            ctx.backend = args[-1]
            ctx.set_materialize_grads(False)
            return run(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            inputs = ctx.saved_tensors
            needs = ctx.needs_input_grad[1 : 1 + step.count]
            results: Sequence[Tensor | None]
            if all(g is None for g in grads):
                results = [None for _ in inputs]
            elif torch.is_grad_enabled():  # create_graph=True: the reference can be differentiated again
                results = _recompute(step, inputs, grads, needs)
            elif backends.dispatches(*grads, *inputs):
                op = getattr(torch.ops.recattn_kernels, f"{step.name}_backward").default
                results = op(*grads, *inputs, ctx.backend)
            else:
                results = step.backward(*grads, *inputs, ctx.backend)
            return (None, *(g if need else None for g, need in zip(results, needs, strict=True)), None)

    # Function.apply in Python serves functorch, under whose transforms no call comes here; the rest of it is in C.
    apply: Callable[..., Tensors] = super(torch.autograd.Function, Derivative).apply
    return apply


def _recompute(
    step: Step, inputs: Tensors, grads: Sequence[Tensor | None], needs: Sequence[bool]
) -> list[Tensor | None]:
    # Views, so that a tensor given for two arguments has a gradient for each.
    views = [t.view_as(t) for t in inputs]
    used = [(o, g) for o, g in zip(step.definition(*views), grads, strict=True) if g is not None and o.requires_grad]
    wanted = [v for v, need in zip(views, needs, strict=True) if need]
    outputs, flow = zip(*used, strict=True)
    found = iter(torch.autograd.grad(outputs, wanted, flow, create_graph=True, allow_unused=True))
    return [next(found) if need else None for need in needs]


def _needs_grad(inputs: Sequence[Tensor]) -> bool:
    return torch.is_grad_enabled() and True in [t.requires_grad for t in inputs]


# A schema of one result means a tensor, not a tuple of one.


def _unwrapped(results: Tensors) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _wrapped(results: Any) -> Tensors:
    return (results,) if isinstance(results, Tensor) else tuple(results)
