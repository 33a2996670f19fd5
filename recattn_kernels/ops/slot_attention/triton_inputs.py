"""dk and dv of several calls of slot_attention in Triton, which repeated.py asks for: configuration and launch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from recattn_kernels.ops.slot_attention.contract import Sizes
from recattn_kernels.ops.slot_attention.triton_arguments import (
    INTERPRETER_BLOCK,
    REGISTERS,
    TYPES,
    Tile,
    common,
    is_aligned,
    is_narrow,
)
from recattn_kernels.ops.slot_attention.triton_inputs_kernels import calls_kernel, inputs_backward_kernel
from recattn_kernels.triton_launch import Launch, Machine, guard, machine

DTYPES = {kind: dtype for dtype, kind in TYPES.items()}
CALLS_ROWS = 4  # of a program


def plan(sizes: Sizes, k: Tensor, v: Tensor | None, on: Machine) -> tuple[Tile, int]:
    """A program's tile, and SLOTS: see triton_inputs_kernels.py."""
    rows = max(16, triton.next_power_of_2(sizes.K))
    widest = max(16, triton.next_power_of_2(max(sizes.D, sizes.Dv)))
    half, aligned, slots = k.dtype == torch.float16, is_aligned(sizes, k, v), 0
    # What the registers hold, as tests/test_aot.py finds it: see triton.py.
    if is_narrow(k, v) and not (half and on.lanes == 64):
        easy = aligned and not half
        block_d = min(widest, 256, (8192 if easy or rows < 32 else 4096) // rows)
        block_n = 32 if rows <= (32 if easy else 16) else 16
        # Shared memory has q and g as a left and as a right operand, k and v once.
        column = 14 * rows + 6 * block_n if half else 8 * rows + 4 * block_n
        while column * block_d > on.shared:
            block_d //= 2
        num_warps = 4 if rows * block_d <= 1024 else 8
        if block_d < widest:  # k and v are read anew for every call: what they are read with takes registers too
            block_d, block_n, num_warps = min(block_d, 128 if aligned else max(16, 1024 // rows)), 16, 8
        if easy and rows <= 32 and widest <= 64:
            block_n, num_warps, slots = 64, 4, 1
    else:
        block_d = max(16, min(widest, 64 if aligned or widest <= 64 else 32, 1024 // rows))
        block_n, num_warps = 16, 8
    if on.interpreted:
        block_n = INTERPRETER_BLOCK
    return Tile(rows, block_n, block_d, triton.cdiv(max(sizes.D, sizes.Dv, 1), block_d), num_warps), slots


def inputs_launches(
    calls: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float, eps: float, denominator: bool, results: tuple[Tensor | None, Tensor | None], on: Machine,
) -> tuple[Launch, Launch]:  # fmt: skip
    (dk, dv), (times, B), K = results, calls.shape[:2], calls.shape[-2]
    heads = k.shape[1] if k.dim() == 4 else 1
    D, Dv = k.shape[-1], (k if v is None else v).shape[-1]
    sizes = Sizes(B, heads, K, k.shape[-2], D, Dv)
    narrow, (tile, slots) = is_narrow(k, v), plan(sizes, k, v, on)
    shared = common(sizes, k, v, slot_mask, input_mask, eps, denominator, narrow, tile, on)
    rows, score, kind = times * B * heads * K, *(DTYPES[shared[name]] for name in ("SCORE_TYPE", "TYPE"))
    q, g = calls.new_empty((rows, D), dtype=score), calls.new_empty((rows, Dv), dtype=kind)
    bias, delta = calls.new_empty(rows), calls.new_empty(rows)
    prepare = {
        "calls_ptr": calls.contiguous(), "q_ptr": q, "g_ptr": g, "bias_ptr": bias, "delta_ptr": delta, "R": rows,
        "D": D, "E": Dv, "ROWS": CALLS_ROWS, "BLOCK_D": triton.next_power_of_2(max(D, Dv, 1)), "TYPE": shared["TYPE"],
        "PRECISION": shared["PRECISION"],
    }  # fmt: skip
    arguments = shared | {
        "q_ptr": q, "g_ptr": g, "bias_ptr": bias, "delta_ptr": delta, "dk_ptr": dk, "dv_ptr": dv, "scale": scale,
        "SLOTS": slots, "T": times, "B": B,
    }  # fmt: skip
    # The first dimension of a grid alone can be large.
    programs = B * heads * triton.cdiv(sizes.N, tile.block_n) * tile.chunks
    return (
        Launch(calls_kernel, (triton.cdiv(rows, CALLS_ROWS),), prepare, 4, REGISTERS),
        Launch(inputs_backward_kernel, (programs,), arguments, tile.num_warps, REGISTERS),
    )


def inputs_backward(
    grad: Tensor, k: Tensor, v: Tensor | None, slot_mask: Tensor | None, input_mask: Tensor | None,
    scale: float, eps: float, denominator: bool, needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None]:  # fmt: skip
    """dk and dv from what every call has handed on: grad, (times, B, [heads,] K, D + Dv + Dv + 2), as repeated.py has
    it. Without v dk has both."""
    none = grad.numel() == 0
    dk, dv = (
        (x.new_zeros if none else x.new_empty)(x.shape) if x is not None and need else None
        for x, need in zip((k, v), needs, strict=True)
    )
    if not none and k.numel() + (0 if v is None else v.numel()) > 0 and (dk is not None or dv is not None):
        with guard(k):
            arguments = (grad, k, v, slot_mask, input_mask, scale, eps, denominator, (dk, dv), machine(k))
            for launch in inputs_launches(*arguments):
                launch.run()
    return dk, dv
