"""slot_attention of the same inputs several times, as the iterations of a layer call it, with one pass for dk and dv.

The gradients of k and v are sums over the calls, and each call's backward would read k and v, write theirs, and add
them to the others'. Here it computes dq and dbias alone and hands on what it was given, so that one pass in the end,
which computes every A anew, writes dk and dv once. What is handed on flows through autograd as a gradient, that of
`pending`: SHARED makes it of k and v, each call, ONCE, takes one row off it, and in the backward puts one on.
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


def _nothing(like: Tensor, times: int) -> Tensor:
    """Zeros of the shape of pending that take no memory: only the gradient has something to say."""
    return like.new_zeros(()).expand(times, *like.shape[1:]).detach()


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
ONCE = _Once(
    "slot_attention_once",
    inputs=f"{INPUTS}, Tensor pending",
    options=OPTIONS,
    outputs=("updates", "rest"),
    kept=("mean", "den"),
    saves=("updates", "mean", "den"),
    elsewhere=("k", "v"),
    definition=_once,
    empty=_empty_once,
)


# q, bias, whether A is wanted -> updates, A or None
Attend = Callable[[Tensor, "Tensor | None", bool], tuple[Tensor, "Tensor | None"]]


def repeated(k: Tensor, v: Tensor | None, times: int, **options: Any) -> Attend:
    """slot_attention() of k, v and options, to be called at most `times` times with A not wanted."""
    requested = options.pop("backend", None)
    backend = ""
    pending: Tensor | None = None

    def attend(q: Tensor, bias: Tensor | None, return_attn: bool) -> tuple[Tensor, Tensor | None]:
        nonlocal backend, pending
        call = api.normalise(q, k, v, bias=bias, return_attn=return_attn, **options)
        if not backend:
            backend = backends.choose(NAME, requested, BACKENDS, call)
            if times > 1 and _defers(backend, call):
                scale, eps, denominator, _, _ = call.options
                shared = (times, q.shape[-2], scale_of(q, scale), eps, denominator)
                (pending,) = SHARED.on(backend, (k, call.inputs[2], *call.inputs[4:]), shared)
        # A call without a gradient must not cut those after it off: its rest of pending would have none either.
        if pending is None or return_attn or not torch.is_grad_enabled():
            updates, attn = api.OPERATOR.on(backend, call.inputs, call.options)
            return updates, attn if return_attn else None
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
