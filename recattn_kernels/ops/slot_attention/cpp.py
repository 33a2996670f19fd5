"""slot_attention on the CPU: hands pointers and strides to csrc/cpu/slot_attention_{forward,backward}.cpp."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from recattn_kernels.ops.slot_attention.contract import Sizes, empty_forward, sizes_of, widths
from recattn_kernels.ops.slot_attention.reference import scale_of
from recattn_kernels.strides import CPU_DTYPES, contiguous, contiguous_rows, cpu, huge_pages, plain, pointer


def forward(*args: Any) -> tuple[Tensor, ...]:
    q, k, v, bias, slot_mask, input_mask, scale, eps, denominator, joint, _ = args
    updates, attn, mean, den = empty_forward(*args)
    wide = updates if updates.dtype == den.dtype else mean
    if slot_mask is not None or input_mask is not None:
        attn.zero_()  # the kernel goes past what is masked
    slots = (plain(q, den.dtype), plain(bias, den.dtype))
    options = (scale_of(q, scale), eps, denominator, joint)
    holds, common = _common(
        sizes_of(q, k, v), k, v, slot_mask, input_mask, options, *map(_slots, slots, (q.shape[-1], 1))
    )
    cpu().slot_attention_forward(common, pointer(wide), pointer(den), _rows(attn if attn.dim() > 1 else None))
    del holds
    if wide is not updates:
        updates.copy_(wide)
    return updates, attn, mean, den


def backward(
    grads: Sequence[Tensor | None], saved: Sequence[Tensor], inputs: Sequence[Any], options: Any, needs: Sequence[bool],
    dk: Tensor | None = None,
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """dk: to which that of this call is added, in place."""
    q, k, v, bias, slot_mask, input_mask = inputs
    scale, eps, denominator, joint, _ = options
    updates, mean, den = saved
    dtype = den.dtype

    def wide(x: Tensor | None, wanted: bool) -> Tensor | None:
        return x.new_empty(x.shape, dtype=dtype) if x is not None and wanted else None

    partly = slot_mask is not None or input_mask is not None or q.shape[-2] == 0
    dq, dbias = wide(q, needs[0]), wide(bias, needs[3])
    add = dk is not None
    dk, dv = dk if add else _grad_of(k, needs[1], partly), _grad_of(v, needs[2], partly)
    dattn = contiguous(grads[1])
    # Lives until the kernel has run: some are copies.
    slots = tuple(plain(x, dtype) for x in (q, bias, updates if updates.dtype == dtype else mean, den, grads[0]))
    D, Dv = q.shape[-1], updates.shape[-1]
    rows = tuple(map(_slots, slots, (D, 1, Dv, 1, Dv)))
    options = (scale_of(q, scale), eps, denominator, joint)
    holds, common = _common(sizes_of(q, k, v), k, v, slot_mask, input_mask, options, *rows[:2])
    cpu().slot_attention_backward(
        common, 1, rows[2:], _rows(dattn), (pointer(dq), pointer(dbias), _rows(dk), _rows(dv)), add
    )
    del holds
    if dq is not None:
        dq = dq.to(q.dtype)
    if dbias is not None:
        dbias = dbias.to(bias.dtype)
    return dq, dk, dv, dbias, None, None


def inputs_backward(
    calls: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None, scale: float,
    eps: float, denominator: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dk and dv of several calls: see repeated.py."""
    partly = slot_mask is not None or input_mask is not None or calls.shape[-2] == 0
    dk, dv = _grad_of(k, needs[0], partly), _grad_of(v, needs[1], partly)
    calls = calls.contiguous()
    parts = calls.split(widths(k, v), -1)
    q, du, updates, bias, den = (_slots(part, calls.shape[-1]) for part in parts)
    options, sizes = (scale, eps, denominator, False), sizes_of(parts[0][0], k, v)
    holds, common = _common(sizes, k, v, slot_mask, input_mask, options, q, bias)
    grads = (0, 0, _rows(dk), _rows(dv))
    cpu().slot_attention_backward(common, calls.shape[0], (updates, den, du), _rows(None), grads, False)
    del holds
    return dk, dv


def _grad_of(x: Tensor | None, wanted: bool, partly: bool) -> Tensor | None:
    """partly: the kernel writes some of it, and the rest is 0."""
    if x is None or not wanted:
        return None
    if partly:
        return torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad = x.new_empty(x.shape)
    huge_pages(grad)
    return grad


def _common(
    sizes: Sizes, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    options: tuple[float, float, bool, bool], q: Slots, bias: Slots,
) -> tuple[list[Any], tuple[Any, ...]]:  # fmt: skip
    """What both directions take; and the tensors that must live for as long as the kernel reads them."""
    keys, values = contiguous_rows(k), None if v is None else contiguous_rows(v)
    masks = [contiguous(slot_mask), contiguous(input_mask)]
    common = (
        tuple(sizes), k.dtype == torch.float64, options[:2], options[2:], torch.get_num_threads(), q, _rows(keys),
        _rows(values), bias, *map(pointer, masks),
    )  # fmt: skip
    return [keys, values, *masks], common


Slots = tuple[int, int]


def _slots(x: Tensor | None, step: int) -> Slots:
    """Pointer, and from one slot to the next, in elements."""
    return pointer(x), step


def _rows(x: Tensor | None) -> tuple[int, int, int, int, int]:
    """Pointer, dtype, and strides over batch, heads and rows, of (B, [heads,] rows, width)."""
    if x is None:
        return (0, 0, 0, 0, 0)
    return (x.data_ptr(), CPU_DTYPES[x.dtype], x.stride(0), x.stride(1) if x.dim() == 4 else 0, x.stride(-2))
