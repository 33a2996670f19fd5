"""An op that takes a few tensors and a few options: registered with torch together with its derivative.

The recurrences register themselves (indrnn, gated): their arguments and what they keep need more words than this has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.autograd import c_apply, derive, needs_grad, recompute

LIBRARY = torch.library.Library("recattn_kernels", "FRAGMENT")
Results = Sequence[Tensor | None]


class Call(NamedTuple):
    """One checked call, as a refusal sees it: x is the tensor whose device and dtype are those of the call."""

    x: Tensor
    inputs: tuple[Tensor | None, ...]
    options: tuple[Any, ...] = ()


class Operator:
    """The op `name` and its backward, registered with torch.library.

    inputs, options: as in a schema ("Tensor q, Tensor? bias", "float scale, bool joint"); at least one input is there.
    outputs: names of the results. kept: of those that only the backward reads. saves: which of both the backward gets;
        it gets all inputs.
    elsewhere: the inputs whose gradients the backward leaves to another op, to which it hands what that takes.
    definition(*inputs, *options): the reference, which gives a tuple of the outputs; None for one that was not asked.
        With create_graph=True it gives the gradients of all inputs.
    empty(*inputs, *options): outputs and kept, as empty tensors; an absent one has no elements.

    A backend is a module with
        forward(*inputs, *options) -> outputs and kept, all of them new tensors
        backward(grads, saved, inputs, options, needs) -> the inputs' gradients. grads: of the outputs, None where there
            is none; needs: which gradients are wanted, the others may be None.
    """

    def __init__(
        self,
        name: str,
        *,
        inputs: str,
        outputs: Sequence[str],
        definition: Callable[..., Results],
        empty: Callable[..., Sequence[Tensor]],
        options: str = "",
        kept: Sequence[str] = (),
        saves: Sequence[str] = (),
        elsewhere: Sequence[str] = (),
    ) -> None:
        self.name, self.definition, self.empty = name, definition, empty
        names = [part.split()[1] for part in inputs.split(", ")]
        self.here = [name not in elsewhere for name in names]
        self.inputs, self.outputs = len(names), len(outputs)
        self.saves = tuple((*outputs, *kept).index(s) for s in saves)
        arguments = ", ".join(filter(None, (inputs, options)))
        flow = ", ".join((*(f"Tensor? grad_{o}" for o in outputs), *(f"Tensor saved_{s}" for s in saves)))
        results = ", ".join(f"Tensor {o}_" if o in names else f"Tensor {o}" for o in (*outputs, *kept))
        grads = ", ".join(f"Tensor grad_{n}_" if n in outputs else f"Tensor grad_{n}" for n in names)
        pt2 = (torch.Tag.pt2_compliant_tag,)
        LIBRARY.define(f"{name}({arguments}, str backend) -> ({results})", tags=pt2)
        LIBRARY.define(f"{name}_backward({flow}, {arguments}, bool[] needs, str backend) -> ({grads})", tags=pt2)
        self.apply = _derivative(self)
        for key in ("CPU", "CUDA"):
            LIBRARY.impl(name, lambda *args: _unwrapped(self._forward(*args)), key)
            LIBRARY.impl(f"{name}_backward", lambda *args: _unwrapped(self._registered_backward(*args)), key)
        derive(LIBRARY, name, self.inputs, self.outputs + len(kept), self.apply)
        register = torch.library.register_fake
        register(f"recattn_kernels::{name}", lambda *args: _unwrapped(empty(*args[:-1])), lib=LIBRARY)
        register(f"recattn_kernels::{name}_backward", lambda *args: _unwrapped(self._empty_grads(*args)), lib=LIBRARY)

    def run(self, table: backends.Table, backend: str | None, call: Call) -> Sequence[Any]:
        """The outputs, on the backend that is asked for."""
        return self.on(backends.choose(self.name, backend, table, call), call.inputs, call.options)

    def on(self, backend: str, inputs: Sequence[Tensor | None], options: Sequence[Any]) -> Sequence[Any]:
        """The outputs, on a backend that takes the call."""
        if backend == "reference":
            return self.definition(*inputs, *options)
        if backends.dispatches(*inputs):
            return _wrapped(self._op(*inputs, *options, backend))[: self.outputs]
        if needs_grad(inputs):
            return self.apply(self._forward, *inputs, *options, backend)[: self.outputs]
        return self._forward(*inputs, *options, backend)[: self.outputs]

    @property
    def _op(self) -> Any:
        return getattr(torch.ops.recattn_kernels, self.name).default

    def _forward(self, *args: Any) -> Sequence[Tensor]:
        return tuple(backends.load(self.name, args[-1]).forward(*args[:-1]))

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        """args: those of the forward, the backend the last."""
        inputs, options = args[: self.inputs], tuple(args[self.inputs : -1])
        result: Results = backends.load(self.name, args[-1]).backward(grads, saved, inputs, options, needs)
        return result

    def _registered_backward(self, *args: Any) -> Sequence[Tensor]:
        # A schema's results are tensors: one that is not wanted has no elements, one that no gradient flows to is 0.
        n = self.outputs + len(self.saves)
        inputs, needs = args[n : n + self.inputs], args[-2]
        found = self._backward(args[: self.outputs], args[self.outputs : n], (*args[n:-2], args[-1]), needs)
        like = next(t for t in inputs if t is not None)
        return tuple(
            like.new_empty(0) if t is None or not need else t.new_zeros(t.shape) if g is None else g
            for t, g, need in zip(inputs, found, needs, strict=True)
        )

    def _empty_grads(self, *args: Any) -> Sequence[Tensor]:
        n = self.outputs + len(self.saves)
        inputs, needs = args[n : n + self.inputs], args[-2]
        like = next(t for t in inputs if t is not None)
        return tuple(
            t.new_empty(t.shape) if need and t is not None else like.new_empty(0)
            for t, need in zip(inputs, needs, strict=True)
        )


def _derivative(op: Operator) -> Callable[..., Sequence[Tensor]]:
    class Derivative(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, run: Callable[..., Any], *args: Any) -> Sequence[Tensor]:
            found = run(*args)
            results: Sequence[Tensor] = found if type(found) is tuple else (found,)
            ctx.save_for_backward(*args[: op.inputs], *(results[i] for i in op.saves))
            ctx.rest = args[op.inputs :]
            ctx.mark_non_differentiable(*results[op.outputs :])
            ctx.set_materialize_grads(False)
            return results

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            kept = ctx.saved_tensors  # once: reading them may compute them anew, as checkpoint() does
            inputs, saved = kept[: op.inputs], kept[op.inputs :]
            needs, grads = list(ctx.needs_input_grad[1 : 1 + op.inputs]), grads[: op.outputs]
            again = torch.is_grad_enabled()  # create_graph=True
            needs = [need and (again or here) for need, here in zip(needs, op.here, strict=True)]
            results: Results
            if all(g is None for g in grads):
                results = [None for _ in inputs]
            elif again:  # the reference can be differentiated once more
                options = ctx.rest[:-1]
                results = recompute(lambda *inputs: op.definition(*inputs, *options), inputs, grads, needs)
            elif backends.dispatches(*grads, *inputs):
                registered = getattr(torch.ops.recattn_kernels, f"{op.name}_backward").default
                args = (*inputs, *ctx.rest[:-1], needs, ctx.rest[-1])
                results = _wrapped(registered(*grads, *saved, *args))
            else:
                results = op._backward(grads, saved, (*inputs, *ctx.rest), needs)
            wanted = (g if need else None for g, need in zip(results, needs, strict=True))
            return (None, *wanted, *(None for _ in ctx.rest))

    return c_apply(Derivative)


# A schema of one result means a tensor, not a tuple of one.


def _unwrapped(results: Sequence[Tensor]) -> Any:
    return results[0] if len(results) == 1 else tuple(results)


def _wrapped(results: Any) -> Sequence[Tensor]:
    return (results,) if isinstance(results, Tensor) else tuple(results)
