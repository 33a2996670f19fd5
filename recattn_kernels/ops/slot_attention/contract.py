"""What a call of slot_attention is once it is checked: the registered op's results, and its backends."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from recattn_kernels import backends
from recattn_kernels.ops import gpu
from recattn_kernels.ops.operator import Call
from recattn_kernels.ops.sequence import compute_dtype

# The op's inputs and options, in the order of the schema: every backend takes them so.
INPUTS = "Tensor q, Tensor k, Tensor? v, Tensor? bias, Tensor? slot_mask, Tensor? input_mask"
OPTIONS = "float? scale, float eps, bool denominator, bool joint, bool return_attn"


class Sizes(NamedTuple):
    B: int
    heads: int
    K: int
    N: int
    D: int
    Dv: int


def sizes_of(q: Tensor, k: Tensor, v: Tensor | None) -> Sizes:
    heads = q.shape[1] if q.dim() == 4 else 1
    return Sizes(q.shape[0], heads, q.shape[-2], k.shape[-2], q.shape[-1], (k if v is None else v).shape[-1])


def empty_forward(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float | None, eps: float, denominator: bool, joint: bool, return_attn: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """updates; attn, without elements unless it is returned; and what the backward needs: mean, the updates before they
    are rounded to 16 bits (else without elements), and den (B, [heads,] K), what they were divided by."""
    wide, Dv = compute_dtype(q.dtype), (k if v is None else v).shape[-1]
    updates = q.new_empty((*q.shape[:-1], Dv))
    attn = q.new_empty((*q.shape[:-1], k.shape[-2]) if return_attn else 0)
    mean = q.new_empty(0 if q.dtype == wide else updates.shape, dtype=wide)
    return updates, attn, mean, q.new_empty(q.shape[:-1], dtype=wide)


def widths(k: Tensor, v: Tensor | None) -> tuple[int, int, int, int, int]:
    """What repeated.py keeps of a slot of a call: query, gradient of its update, update, bias, den."""
    D, Dv = k.shape[-1], (k if v is None else v).shape[-1]
    return D, Dv, Dv, 1, 1


def _triton_refusal(call: Call) -> str | None:
    if (reason := gpu.refusal_of_float64(call)) is not None:
        return reason
    q, k, v = call.x, call.inputs[1], call.inputs[2]
    assert k is not None
    _, heads, K, _, D, Dv = sizes_of(q, k, v)
    if call.options[3] and heads > 1 and K > 64:  # on sm_100 its backward finds no registers
        return f"K must be at most 64 where heads compete together, got {K}"
    if K > 128:
        return f"K must be at most 128, got {K}"
    if max(D, Dv) > 512:
        return f"q's and v's widths must be at most 512, got {max(D, Dv)}"
    return None


BACKENDS: backends.Table = {"cpp": backends.no_refusal, "triton": _triton_refusal}
