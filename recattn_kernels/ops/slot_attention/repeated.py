"""slot_attention of the same inputs several times, as the iterations of a layer call it: dk and dv in one pass, or one
sum that each call adds to.

The gradients of k and v are sums over the calls, and each call's backward would read k and v, write theirs, and add
them to the others'. Here it computes dq and dbias alone and hands on what it was given, so that one pass in the end,
which computes every A anew, writes dk and dv once. What is handed on flows through autograd as a gradient, that of
`pending`: SHARED makes it of k and v, each call, ONCE, takes one row off it, and in the backward puts one on.

Where each call's pass is the faster (see pays()) but v is k, its backward adds to the dk of the calls after it, which
arrives as the gradient of `flow`: FLOW makes it of k, and each call, ADDED, hands it on.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops.operator import Call, Operator, Results
from recattn_kernels.ops.sequence import compute_dtype
from recattn_kernels.ops.slot_attention import api, reference
from recattn_kernels.ops.slot_attention.contract import BACKENDS, INPUTS, OPTIONS, empty_forward, widths
from recattn_kernels.ops.slot_attention.reference import scale_of

NAME = "slot_attention"


class _Shared(Operator):
    """k, v -> pending (times, B, [heads,] K, sum of widths), whose gradient is what the calls hand on."""

    def _forward(self, *args: Any) -> Sequence[Tensor]:
        return tuple(self.empty(*args[:-1]))

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        k, v, slot_mask, input_mask, _, _, scale, eps, denominator, backend = args
        fused = backends.load(NAME, backend)
        dk, dv = fused.inputs_backward(grads[0], k, v, slot_mask, input_mask, scale, eps, denominator, needs[:2])
        return dk, dv, None, None


class _Once(Operator):
    """q, k, v, ..., pending -> updates, and pending without its first row."""

    def _forward(self, *args: Any) -> Sequence[Tensor]:
        *inputs, pending = args[: self.inputs]
        updates, _, mean, den = backends.load(NAME, args[-1]).forward(*inputs, *args[self.inputs : -1])
        return updates, _nothing(pending, pending.shape[0] - 1), mean, den

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        q, k, v, bias, slot_mask, input_mask, pending = args[: self.inputs]
        (du, rest), (updates, mean, den) = grads, saved
        dq = dbias = None
        if du is not None and (needs[0] or needs[3]):
            inputs = (q, k, v, bias, slot_mask, input_mask)
            wanted = (needs[0], False, False, needs[3], False, False)
            fused = backends.load(NAME, args[-1])
            dq, _, _, dbias, _, _ = fused.backward((du, None), saved, inputs, args[self.inputs : -1], wanted)
        handed = pending.new_empty(pending.shape)
        if rest is None:
            handed[1:] = 0
        else:
            handed[1:] = rest
        if du is None:
            handed[0] = 0
        else:
            wide = updates if updates.dtype == den.dtype else mean
            parts = (q, du, wide, 0.0 if bias is None else bias.unsqueeze(-1), den.unsqueeze(-1))
            for column, part in zip(handed[0].split(widths(k, v), -1), parts, strict=True):
                column[...] = part
        return dq, None, None, dbias, None, None, handed


_OURS = "_sum_of_slot_attention_added"  # an attribute of a sum that ADDED's backward has made, and so may write to


class _Flow(Operator):
    """k -> flow, whose gradient is dk."""

    def _forward(self, *args: Any) -> Sequence[Tensor]:
        return tuple(self.empty(*args[:-1]))

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        if hasattr(grads[0], _OURS):
            delattr(grads[0], _OURS)
        return (grads[0],)


class _Added(Operator):
    """q, k, ..., flow -> updates, and flow for the next call."""

    def _forward(self, *args: Any) -> Sequence[Tensor]:
        *inputs, flow = args[: self.inputs]
        updates, _, mean, den = backends.load(NAME, args[-1]).forward(*inputs, *args[self.inputs : -1])
        return updates, _like(flow), mean, den

    def _backward(self, grads: Results, saved: Sequence[Tensor], args: Sequence[Any], needs: Sequence[bool]) -> Results:
        inputs = args[: self.inputs - 1]
        du, dk = grads
        if du is None:
            return *(None for _ in inputs), dk
        if dk is not None and not hasattr(dk, _OURS):
            dk = dk.clone(memory_format=torch.contiguous_format)
        wanted = (needs[0], needs[-1], False, needs[3], False, False)
        options, fused = args[self.inputs : -1], backends.load(NAME, args[-1])
        dq, dk, _, dbias, _, _ = fused.backward((du, None), saved, inputs, options, wanted, dk)
        if dk is not None:
            setattr(dk, _OURS, True)
        return dq, None, None, dbias, None, None, dk

    def _registered_backward(self, *args: Any) -> Sequence[Tensor]:
        # A registered op changes none of its inputs.
        du, dk, *rest = args
        if hasattr(dk, _OURS):
            dk = dk.clone()
        return super()._registered_backward(du, dk, *rest)


def _nothing(like: Tensor, times: int) -> Tensor:
    """Zeros of the shape of pending that take no memory: only the gradient has something to say."""
    return like.new_zeros(()).expand(times, *like.shape[1:]).detach()


def _like(x: Tensor) -> Tensor:
    """Zeros of the shape of x that take no memory."""
    return x.new_zeros(()).expand(x.shape).detach()


def _empty_added(*args: Any) -> tuple[Tensor, ...]:
    updates, _, mean, den = empty_forward(*args[:6], *args[7:])
    return updates, _like(args[6]), mean, den


def _added(*args: Any) -> tuple[Tensor | None, ...]:
    updates, _ = reference.slot_attention(*args[:6], *args[7:])  # whose gradient has dk: flow has that of later calls
    return updates, args[6].clone()


def _empty_shared(
    k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None, times: int, K: int, *_: Any
) -> tuple[Tensor]:
    shape = (times, *k.shape[:-2], K, sum(widths(k, v)))
    return (k.new_zeros((), dtype=compute_dtype(k.dtype)).expand(shape),)


def _empty_once(*args: Any) -> tuple[Tensor, ...]:
    updates, _, mean, den = empty_forward(*args[:6], *args[7:])
    pending = args[6]
    return updates, _nothing(pending, pending.shape[0] - 1), mean, den


def _once(*args: Any) -> tuple[Tensor | None, ...]:
    pending = args[6]
    updates, _ = reference.slot_attention(*args[:6], *args[7:])  # whose gradient has dk and dv: none are pending
    return updates, pending[1:].clone()


SHARED = _Shared(
    "slot_attention_shared",
    inputs="Tensor k, Tensor? v, Tensor? slot_mask, Tensor? input_mask",
    options="int times, SymInt K, float scale, float eps, bool denominator",
    outputs=("pending",),
    definition=_empty_shared,
    empty=_empty_shared,
)
_OF_A_CALL: dict[str, Any] = {
    "options": OPTIONS, "outputs": ("updates", "rest"), "kept": ("mean", "den"), "saves": ("updates", "mean", "den"),
    "elsewhere": ("k", "v"),
}  # fmt: skip
ONCE = _Once(
    "slot_attention_once",
    inputs=f"{INPUTS}, Tensor pending",
    **_OF_A_CALL,
    definition=_once,
    empty=_empty_once,
)
FLOW = _Flow(
    "slot_attention_flow",
    inputs="Tensor k",
    outputs=("flow",),
    definition=lambda k: (_like(k),),
    empty=lambda k: (_like(k),),
)
ADDED = _Added(
    "slot_attention_added",
    inputs=f"{INPUTS}, Tensor flow",
    **_OF_A_CALL,
    definition=_added,
    empty=_empty_added,
)


# q, bias, whether A is wanted -> updates, A or None
Attend = Callable[[Tensor, "Tensor | None", bool], tuple[Tensor, "Tensor | None"]]


def repeated(k: Tensor, v: Tensor | None, times: int, **options: Any) -> Attend:
    """slot_attention() of k, v and options, to be called at most `times` times with A not wanted."""
    requested = options.pop("backend", None)
    backend = ""
    pending: Tensor | None = None
    flow: Tensor | None = None

    def attend(q: Tensor, bias: Tensor | None, return_attn: bool) -> tuple[Tensor, Tensor | None]:
        nonlocal backend, pending, flow
        call = api.normalise(q, k, v, bias=bias, return_attn=return_attn, **options)
        if not backend:
            backend = backends.choose(NAME, requested, BACKENDS, call)
            if times > 1 and _defers(backend, call):
                scale, eps, denominator, _, _ = call.options
                shared = (times, q.shape[-2], scale_of(q, scale), eps, denominator)
                (pending,) = SHARED.on(backend, (k, call.inputs[2], *call.inputs[4:]), shared)
            elif times > 1 and _adds(backend, call):
                (flow,) = FLOW.on(backend, (k,), ())
        # A call without a gradient must not cut those after it off: its rest of pending would have none either.
        if (pending is None and flow is None) or return_attn or not torch.is_grad_enabled():
            updates, attn = api.OPERATOR.on(backend, call.inputs, call.options)
            return updates, attn if return_attn else None
        if flow is not None:
            updates, flow = ADDED.on(backend, (*call.inputs, flow), call.options)
            return updates, None
        assert pending is not None
        if pending.shape[0] == 0:
            raise RuntimeError(f"{NAME}: repeated() was announced {times} calls, and this is one more")
        if pending.shape[-2] != q.shape[-2]:
            raise ValueError(f"{NAME}: q must have K = {pending.shape[-2]} slots in every call, got {q.shape[-2]}")
        updates, pending = ONCE.on(backend, (*call.inputs, pending), call.options)
        return updates, None

    return attend


def _defers(backend: str, call: Call) -> bool:
    """Whether the calls leave dk and dv to one pass."""
    k, v = call.inputs[1:3]
    joint = call.options[3]
    needed = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (k, v))
    return backend != "reference" and needed and not backends.tracing() and not joint and pays(backend, call)


def _adds(backend: str, call: Call) -> bool:
    """Whether the calls add up dk in their backward, where torch would read and write it once more for each."""
    k, v = call.inputs[1:3]
    if backend != "cpp" or v is not None or backends.tracing() or torch.compiler.is_compiling():
        return False
    return torch.is_grad_enabled() and k is not None and k.requires_grad


# Beyond it the CPU computes every A anew for longer than it adds up gradients.
MOST_SLOTS_ON_CPU = 16


def pays(backend: str, call: Call) -> bool:
    """Whether one pass for dk and dv is faster than one for each call.

    Of three calls it makes 21 products of K rows out of 15, and saves most of the memory's traffic. Backward, on two
    cores of an AMD EPYC with AVX-512: where k and v are two tensors, 0.87 to 0.95 of the time at K = 7 and 10, and 1.18
    at 24; where v is k, 1.0 to 1.3. A GPU has products to spare in its matrix units, which multiply anything but exact
    float32; none has measured it yet.
    """
    _, k, v, *_ = call.inputs
    assert k is not None
    if backend == "cpp":
        # A compiled graph does not ask for sizes: it would be one for each answer.
        return v is not None and (torch.compiler.is_compiling() or call.x.shape[-2] <= MOST_SLOTS_ON_CPU)
    return k.dtype != torch.float32 or backends.allows_tf32()
